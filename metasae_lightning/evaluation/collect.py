"""Run SAEs over the same held-out text: codes of every token and sums of every document, cached passage by passage."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from metasae_lightning.compute.row_chunks import is_blocked
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.bootstrap import sum_by_document
from metasae_lightning.evaluation.held_out_text import Passage, passages, stream_cache_key
from metasae_lightning.evaluation.padded_codes import room_for
from metasae_lightning.evaluation.pending_entries import PendingEntries
from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.evaluation.saes import EvaluatedSAE
from metasae_lightning.evaluation.splice import Rebuild, losses
from metasae_lightning.metrics.loss_recovered import with_recovered_shares
from metasae_lightning.metrics.reconstruction import Reconstruction
from metasae_lightning.step import Codes

# Tokens whose predictions are in memory at once on a CPU; a vocabulary is wide.
SPLICED_AT_ONCE = 512
# Predictions of one kind in memory at once on a GPU, tokens times vocabulary: 512 MiB of float32.
SPLICED_ELEMENTS = 2**27


@dataclass(frozen=True)
class CollectedCodes:
    """Codes of one SAE on held-out text, read from its result cache."""

    subject: EvaluatedSAE
    """The SAE."""
    text: dict[str, Any]
    """Cache key of the text stream."""
    text_hashes: list[str]
    """Hash of each passage's text, in order."""

    @cached_property
    def cache_key(self) -> dict[str, Any]:
        """Cache key of this SAE's codes: weights, thresholds and text stream."""
        return {**self.subject.cache_key, "text": self.text}

    def passage_key(self, text_hash: str) -> dict[str, Any]:
        """Cache key of one passage, by the hash of its text."""
        return {**self.cache_key, "tokens": text_hash}

    def entries(self) -> Iterator[Entry]:
        """The cached entry of each passage, in order."""
        for number, text_hash in enumerate(self.text_hashes):
            yield self.subject.result_cache.get(passage_name(number), self.passage_key(text_hash))

    @property
    def device(self) -> torch.device:
        """The SAE's device."""
        return self.subject.W_dec.device

    def codes(self, device: torch.device | str = "cpu") -> Iterator[tuple[Codes, Entry]]:
        """The codes of each passage on a device, with its cached entry, which is on the CPU."""
        width = len(self.subject.W_dec)
        for entry in self.entries():
            lengths, latents, values = (entry[name].to(device, non_blocking=True) for name in ("lengths", "latents", "values"))
            rows = torch.repeat_interleave(lengths.long(), output_size=len(latents))
            yield Codes(rows, latents.long(), values, (len(lengths), width)), entry

    @cached_property
    def reconstruction(self) -> Reconstruction:
        """The reconstruction metric over all passages."""
        width, d_in = self.subject.W_dec.shape
        metric, nothing = Reconstruction(d_in), torch.zeros(0, d_in)
        metric.update(nothing, nothing, Codes.from_dense(torch.zeros(0, width)))  # a metric without any update would warn
        for entry in self.entries():
            metric.merge_state({name.split("/")[1]: value for name, value in entry.items() if name.startswith("reconstruction/")})
        return metric

    @cached_property
    def by_document(self) -> tuple[Int[Tensor, " document"], Float[Tensor, "document figure"], Float[Tensor, "document d_in"]]:
        """The ids of all documents, a table of their figures, and the sum of activations of each document.

        The columns of the table are sums over the tokens of a document: tokens, squared norm, squared error, firings and cosine.
        """
        by_passage = [(entry["documents"], entry["sums"], entry["total"]) for entry in self.entries()]
        documents, sums, total = (torch.cat(parts) for parts in zip(*by_passage, strict=True))
        ids, sums = sum_by_document(documents, sums)
        return ids, sums, sum_by_document(documents, total)[1]

    @cached_property
    def head_error_by_document(self) -> Float[Tensor, " document"]:
        """The squared error of each document with the SAE and its head, in the order of `by_document`."""
        by_passage = [(entry["documents"], entry["head_error"]) for entry in self.entries()]
        documents, error = (torch.cat(parts) for parts in zip(*by_passage, strict=True))
        return sum_by_document(documents, error)[1][:, 0]

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean activation over all tokens."""
        _, sums, total = self.by_document
        return total.sum(0) / sums[:, 0].sum()


@dataclass(frozen=True)
class SplicedLosses:
    """Losses of the language model with an SAE spliced in, by document."""

    documents: Int[Tensor, " document"]
    """Document ids."""
    sums: Float[Tensor, "document figure"]
    """Per document: number of predicted tokens, then the sums of their losses in the order of `loss_recovered.LOSS_KINDS`."""

    def figures(self) -> dict[str, float]:
        """Mean losses per predicted token and the shares recovered (see `Splice`), over all documents."""
        count, *total = self.sums.sum(0)
        return {name: value.item() for name, value in with_recovered_shares(torch.stack(total) / count).items()}


def passage_name(number: int) -> str:
    """Name of a passage's cache entries."""
    return f"passage-{number:05d}"


def collect(subjects: Sequence[EvaluatedSAE], stream: Any, tokens: int) -> list[CollectedCodes]:
    """Run every SAE over the passages of a split, except those in its result cache. A split without a passage is an `InputError`.

    On a GPU the first passage tells the room for active latents; later passages are computed without a wait, in that room.
    """
    stream_key = stream_cache_key(stream)
    collected, rooms = [CollectedCodes(subject, stream_key, []) for subject in subjects], dict[int, int]()
    with progress_bar("activations", tokens) as bar, PendingEntries() as pending:
        for passage in passages(stream, tokens):
            name, text_hash = passage_name(passage.number), passage.text_hash
            keys = [codes.passage_key(text_hash) for codes in collected]
            missing = [
                index
                for index, (codes, key) in enumerate(zip(collected, keys, strict=True))
                if not pending.has(codes.subject.result_cache, name, key)
            ]
            activations = passage.read() if missing else None
            for index in missing:
                assert activations is not None
                subject, room = collected[index].subject, rooms.get(index)
                # Two arms of a run may hold the same SAE: the second finds the entry of the first.
                if pending.has(subject.result_cache, name, keys[index]):
                    continue
                entry = encode_passage(subject, passage, *activations, room)
                if room is None and not is_blocked(entry["values"]):
                    rooms[index] = room_for(entry["lengths"])
                pending.put(subject.result_cache, name, keys[index], entry, partial(without_padding, subject, passage))
            for codes in collected:
                codes.text_hashes.append(text_hash)
            bar.update(int(passage.tokens.numel()) if activations is None else len(activations[0]))
    if not collected[0].text_hashes:
        raise InputError("data: the split holds no passage to measure on")
    return collected


def encode_passage(
    subject: EvaluatedSAE, passage: Passage, x: Float[Tensor, "row d_in"], counted: Tensor, room: int | None = None
) -> Entry:
    """The cache entry of one SAE on one passage: text, codes, sums by document, and the state of the reconstruction metric.

    With a `room` for the active latents of a token the codes are padded (see `PaddedCodes`), and the host does not wait for a GPU.
    """
    if room is None:
        codes, rebuilt = subject.encode_decode(x)
        latents, values, lengths = codes.latents, codes.values, codes.lengths()
    else:
        padded, rebuilt = subject.encode_decode_padded(x, room)
        codes, latents, values, lengths = padded.with_zeros(), padded.latents, padded.values, padded.lengths
    x = x.to(rebuilt)
    with x.device:  # new sums on this device; sums that are moved to a GPU would make the host wait
        metric = Reconstruction(x.shape[1])
    metric.update(x, rebuilt, codes)
    wide, error = x.double(), (x.double() - rebuilt.double()).square().sum(1)
    cosine = torch.nn.functional.cosine_similarity(wide, rebuilt.double(), dim=1)
    figures = torch.stack([torch.ones_like(error), wide.square().sum(1), error, lengths.double(), cosine], 1)
    owner = passage.documents[counted]
    documents, sums = sum_by_document(owner, figures)
    head: Entry = {}
    if subject.head is not None:
        head["head_error"] = sum_by_document(owner, (wide - subject.reconstruct_with_head(x).double()).square().sum(1, keepdim=True))[1]
    state = {**metric.metric_state, "active": lengths.sum().double()}
    return {
        **{"tokens": passage.tokens.int(), "counted": counted, "owner": passage.documents},
        **{"latents": latents.int(), "lengths": lengths.int(), "values": values.float()},
        **{"documents": documents, "sums": sums, "total": sum_by_document(owner, wide)[1]},
        **{f"reconstruction/{name}": torch.as_tensor(value) for name, value in state.items()},
        **head,
    }


def without_padding(subject: EvaluatedSAE, passage: Passage, entry: Entry) -> Entry:
    """An entry on the CPU without the free places of padded codes. If a token had more active latents than room, it is computed again."""
    latents, lengths = entry["latents"], entry["lengths"]
    if latents.ndim == 1:
        return entry
    if len(lengths) and int(lengths.max()) > latents.shape[1]:
        return encode_passage(subject, passage, *passage.read())
    is_filled = torch.arange(latents.shape[1]) < lengths[:, None]
    return {**entry, "latents": latents[is_filled], "values": entry["values"][is_filled]}


class SplicedReconstruction(NamedTuple):
    """A reconstruction to splice into the language model."""

    codes: CollectedCodes
    """The codes of its SAE."""
    entry: str = "splice"
    """The first part of the names of its cache entries."""

    @property
    def rebuild(self) -> Rebuild:
        """A function that reconstructs raw activations, by the SAE alone or together with its head."""
        return self.codes.subject.reconstruct if self.entry == "splice" else self.codes.subject.reconstruct_with_head


def reconstructions(collected: Sequence[CollectedCodes]) -> list[SplicedReconstruction]:
    """The reconstruction by every SAE alone; then that by each SAE that has a head, together with it."""
    with_head = [SplicedReconstruction(codes, "splice-head") for codes in collected if codes.subject.head is not None]
    return [*map(SplicedReconstruction, collected), *with_head]


def collect_spliced_losses(spliced: Sequence[SplicedReconstruction], stream: Any, tokens: int, complete: Any) -> list[SplicedLosses]:
    """Losses of the complete language model with each reconstruction spliced in, on the first contexts.

    The first contexts are those that hold `tokens` predicted tokens. `complete` loads and returns the model; it is called only if an entry
    is missing from a result cache.
    """
    names_and_keys: list[list[tuple[str, dict[str, Any]]]] = [[] for _ in spliced]
    first, mean, model, remaining = spliced[0].codes, spliced[0].codes.mean, None, tokens
    with progress_bar("spliced", tokens) as bar, PendingEntries() as pending:
        for passage in passages(stream, tokens):
            counted = first.subject.result_cache.get(passage_name(passage.number), first.passage_key(passage.text_hash))["counted"].bool()
            contexts = 1 + int((counted[:, 1:].sum(1).cumsum(0) < remaining).sum())
            # Ablation by the mean activation makes losses depend on the whole text.
            text = {"all": first.text_hashes, "contexts": min(contexts, len(counted))}
            places = [(f"{entry}-{passage.number:05d}", {**codes.cache_key, **text}) for codes, entry in spliced]
            # SAEs that share an entry are measured once.
            files = {spliced[index].codes.subject.result_cache.path(*place): index for index, place in enumerate(places)}
            missing = [index for path, index in files.items() if not path.exists()]
            if missing:
                if model is None:
                    model = complete()
                    mean = mean.to(model.device)
                rebuild = {str(index): spliced[index].rebuild for index in missing}
                measured = _spliced_entries(model, passage, counted[:contexts], rebuild, mean)
                for index in missing:
                    pending.put(spliced[index].codes.subject.result_cache, *places[index], measured[str(index)])
            for place, of_reconstruction in zip(places, names_and_keys, strict=True):
                of_reconstruction.append(place)
            count = int(counted[:contexts, 1:].sum())
            bar.update(count)
            remaining -= count
            if remaining <= 0:
                break
    return [_read_spliced_losses(each.codes, places) for each, places in zip(spliced, names_and_keys, strict=True)]


def _read_spliced_losses(codes: CollectedCodes, names_and_keys: Sequence[tuple[str, dict[str, Any]]]) -> SplicedLosses:
    """The losses in the cached entries of one SAE, summed by document."""
    entries = [codes.subject.result_cache.get(name, key) for name, key in names_and_keys]
    return SplicedLosses(*sum_by_document(*(torch.cat([entry[field] for entry in entries]) for field in ("documents", "sums"))))


def _spliced_entries(model: Any, passage: Passage, counted: Tensor, rebuild: dict[str, Any], mean: Tensor) -> dict[str, Entry]:
    """The language model's losses with each reconstruction in `rebuild` spliced in, on a passage's first contexts, summed by document."""
    parts: dict[str, list[Tensor]] = {name: [] for name in rebuild}
    at_once = max(1, spliced_at_once(model) // counted.shape[1])
    for begin in range(0, len(counted), at_once):
        chosen = slice(begin, min(begin + at_once, len(counted)))
        visible = None if passage.visible is None else passage.visible[chosen]
        for name, values in losses(model, passage.tokens[chosen], visible, counted[chosen], rebuild, mean).items():
            parts[name].append(values)
    # A prediction counts if the predicted token is one that SAEs are evaluated on.
    predicted, documents_of_predicted = counted[:, 1:], passage.documents[: len(counted), 1:]
    places = predicted.flatten().nonzero().flatten()
    entries: dict[str, Entry] = {}
    for name, values in parts.items():
        by_place = torch.cat(values, 1).double().flatten(1)
        rows = by_place.index_select(1, places.to(by_place.device, non_blocking=True)).T
        documents, sums = sum_by_document(documents_of_predicted[predicted], torch.cat([torch.ones_like(rows[:, :1]), rows], 1))
        entries[name] = {"documents": documents, "sums": sums}
    return entries


def spliced_at_once(model: Any) -> int:
    """Tokens whose predictions are in memory at once: few on a CPU, as many as `SPLICED_ELEMENTS` allow on a GPU."""
    return SPLICED_AT_ONCE if model.device.type == "cpu" else max(SPLICED_AT_ONCE, SPLICED_ELEMENTS // max(1, len(model.tokenizer)))


def progress_bar(words: str, total: int) -> Any:
    """A progress bar of tokens with the label `words`; where there is no terminal, a line every half minute."""
    return tqdm(total=total, desc=words, unit="tok", unit_scale=True, leave=False, mininterval=0.5 if sys.stderr.isatty() else 30.0)

"""Run SAEs over the same held-out text: codes of every token and sums of every document, cached passage by passage."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.bootstrap import sum_by_document
from metasae_lightning.evaluation.held_out_text import Passage, passages, stream_cache_key
from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.evaluation.saes import EvaluatedSAE
from metasae_lightning.evaluation.splice import losses
from metasae_lightning.metrics.loss_recovered import recovered
from metasae_lightning.metrics.reconstruction import Reconstruction
from metasae_lightning.step import Codes

# Tokens whose predictions are in memory at once; a vocabulary is wide.
SPLICED_AT_ONCE = 512


@dataclass(frozen=True)
class CollectedCodes:
    """Codes of one SAE on held-out text, read from its result cache."""

    subject: EvaluatedSAE
    """The SAE."""
    text: dict[str, Any]
    """Cache key of the text stream."""
    digests: list[str]
    """Hash of each passage's text, in order."""

    @cached_property
    def cache_key(self) -> dict[str, Any]:
        """Cache key of this SAE's codes: weights, thresholds and text stream."""
        return {**self.subject.cache_key, "text": self.text}

    def of(self, digest: str) -> dict[str, Any]:
        """Cache key of one passage, by the hash of its text."""
        return {**self.cache_key, "tokens": digest}

    def entries(self) -> Iterator[Entry]:
        """The cached entry of each passage, in order."""
        for number, digest in enumerate(self.digests):
            yield self.subject.result_cache.get(f"passage-{number:05d}", self.of(digest))

    def codes(self) -> Iterator[tuple[Codes, Entry]]:
        """The codes of each passage with its cached entry."""
        width = len(self.subject.W_dec)
        for piece in self.entries():
            lengths = piece["lengths"].long()
            rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            yield Codes(rows, piece["latents"].long(), piece["values"], (len(lengths), width)), piece

    @cached_property
    def reconstruction(self) -> Reconstruction:
        """The reconstruction metric over all passages."""
        width, d_in = self.subject.W_dec.shape
        metric, nothing = Reconstruction(d_in), torch.zeros(0, d_in)
        metric.update(nothing, nothing, Codes.from_dense(torch.zeros(0, width)))  # one that saw nothing at all would warn
        for piece in self.entries():
            metric.merge_state({name.split("/")[1]: value for name, value in piece.items() if name.startswith("reconstruction/")})
        return metric

    @cached_property
    def by_document(self) -> tuple[Int[Tensor, " document"], Float[Tensor, "document figure"], Float[Tensor, "document d_in"]]:
        """Document ids; per document the sums of tokens, squared norm, squared error, firings and cosine; and the sum of activations."""
        found = [(piece["documents"], piece["sums"], piece["total"]) for piece in self.entries()]
        documents, sums, total = (torch.cat(parts) for parts in zip(*found, strict=True))
        ids, sums = sum_by_document(documents, sums)
        return ids, sums, sum_by_document(documents, total)[1]

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Mean activation."""
        _, sums, total = self.by_document
        return total.sum(0) / sums[:, 0].sum()


@dataclass(frozen=True)
class SplicedLosses:
    """Losses of the language model with an SAE spliced in, by document."""

    documents: Int[Tensor, " document"]
    """Document ids."""
    sums: Float[Tensor, "document figure"]
    """Per document: number of predicted tokens, then the sums of their losses in the order of `loss_recovered.KINDS`."""

    def figures(self) -> dict[str, float]:
        """Mean losses and shares recovered, over all documents."""
        count, *total = self.sums.sum(0)
        return {name: value.item() for name, value in recovered(torch.stack(total) / count).items()}


def collect(subjects: Sequence[EvaluatedSAE], stream: Any, tokens: int) -> list[CollectedCodes]:
    """Run every SAE over the passages of a split; passages in its result cache are not run again."""
    text = stream_cache_key(stream)
    seen = [CollectedCodes(subject, text, []) for subject in subjects]
    with progress_bar("activations", tokens) as bar:
        for passage in passages(stream, tokens):
            name, digest = f"passage-{passage.number:05d}", passage.digest
            missing = [one for one in seen if not one.subject.result_cache.has(name, one.of(digest))]
            read = passage.read() if missing else None
            for one in missing:
                assert read is not None
                # Two arms of a run may be one SAE: what the first left is there for the second.
                one.subject.result_cache.get_or_compute(name, one.of(digest), partial(encode_passage, one.subject, passage, *read))
            for one in seen:
                one.digests.append(digest)
            bar.update(int(passage.tokens.numel()) if read is None else len(read[0]))
    if not seen[0].digests:
        raise InputError("data: the split holds no passage to measure on")
    return seen


def encode_passage(subject: EvaluatedSAE, passage: Passage, x: Float[Tensor, "row d_in"], counted: Tensor) -> Entry:
    """The cache entry of one SAE on one passage: codes, sums by document, and the state of the reconstruction metric."""
    codes, rebuilt = subject.encode_decode(x)
    x = x.to(rebuilt)
    metric = Reconstruction(x.shape[1]).to(x.device)
    metric.update(x, rebuilt, codes)
    lengths = torch.bincount(codes.rows, minlength=len(x))
    wide, error = x.double(), (x.double() - rebuilt.double()).square().sum(1)
    cosine = torch.nn.functional.cosine_similarity(wide, rebuilt.double(), dim=1)
    figures = torch.stack([torch.ones_like(error), wide.square().sum(1), error, lengths.double(), cosine], 1).cpu()
    owner = passage.documents[counted]
    documents, sums = sum_by_document(owner, figures)
    return {
        **{"tokens": passage.tokens.int(), "counted": counted, "owner": passage.documents},
        **{"latents": codes.latents.int(), "lengths": lengths.int(), "values": codes.values.float()},
        **{"documents": documents, "sums": sums, "total": sum_by_document(owner, wide.cpu())[1]},
        **{f"reconstruction/{name}": torch.as_tensor(value) for name, value in metric.metric_state.items()},
    }


def collect_spliced_losses(seen: Sequence[CollectedCodes], stream: Any, tokens: int, complete: Any) -> list[SplicedLosses]:
    """Losses of the complete language model on the first contexts, with each SAE's reconstruction spliced in.

    `complete` loads the model; it is called only if an entry is missing from a result cache.
    """
    pieces: list[list[Entry]] = [[] for _ in seen]
    mean, model, left = seen[0].mean, None, tokens
    with progress_bar("spliced", tokens) as bar:
        for passage in passages(stream, tokens):
            counted = seen[0].subject.result_cache.get(f"passage-{passage.number:05d}", seen[0].of(passage.digest))["counted"].bool()
            contexts = 1 + int((counted[:, 1:].sum(1).cumsum(0) < left).sum())
            # Ablation by the mean makes losses a function of all of the text.
            of = {"all": seen[0].digests, "contexts": min(contexts, len(counted))}
            name = f"splice-{passage.number:05d}"
            lacking = {one.subject.result_cache.path(name, {**one.cache_key, **of}): place for place, one in enumerate(seen)}
            missing = [place for path, place in lacking.items() if not path.exists()]
            if missing:
                model = model or complete()
                found = _splice(
                    model, passage, counted[:contexts], {str(place): seen[place].subject.reconstruct for place in missing}, mean
                )
                for place in missing:
                    seen[place].subject.result_cache.put(name, {**seen[place].cache_key, **of}, found[str(place)])
            for place, one in enumerate(seen):
                pieces[place].append(one.subject.result_cache.get(name, {**one.cache_key, **of}))
            count = int(pieces[0][-1]["sums"][:, 0].sum())
            bar.update(count)
            left -= count
            if left <= 0:
                break
    return [
        SplicedLosses(*sum_by_document(*(torch.cat([piece[key] for piece in found]) for key in ("documents", "sums")))) for found in pieces
    ]


def _splice(model: Any, passage: Passage, counted: Tensor, rebuild: dict[str, Any], mean: Tensor) -> dict[str, Entry]:
    """Losses on a passage's first contexts, summed by document, for each SAE."""
    parts: dict[str, list[Tensor]] = {name: [] for name in rebuild}
    at_once = max(1, SPLICED_AT_ONCE // counted.shape[1])
    for begin in range(0, len(counted), at_once):
        chosen = slice(begin, min(begin + at_once, len(counted)))
        visible = None if passage.visible is None else passage.visible[chosen]
        found = losses(model, passage.tokens[chosen], visible, counted[chosen], rebuild, mean)
        for name, values in found.items():
            parts[name].append(values)
    # A prediction counts where the predicted token is one that SAEs are judged on.
    after, owner = counted[:, 1:], passage.documents[: len(counted), 1:]
    pieces: dict[str, Entry] = {}
    for name, values in parts.items():
        rows = torch.cat(values, 1).double()[:, after].T
        documents, sums = sum_by_document(owner[after], torch.cat([torch.ones(len(rows), 1, dtype=torch.float64), rows], 1))
        pieces[name] = {"documents": documents, "sums": sums}
    return pieces


def progress_bar(words: str, total: int) -> Any:
    """A progress bar on a terminal, a line every half minute elsewhere."""
    return tqdm(total=total, desc=words, unit="tok", unit_scale=True, leave=False, mininterval=0.5 if sys.stderr.isatty() else 30.0)

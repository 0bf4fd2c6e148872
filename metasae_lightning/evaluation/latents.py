"""The latents of an SAE: their activations on the user's texts, and their contexts in held-out text."""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, SupportsIndex

from jaxtyping import Bool, Float
from torch import Tensor

from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.examples import AFTER, BEFORE
from metasae_lightning.evaluation.sae_data import data_for
from metasae_lightning.evaluation.saes import EvaluatedSAE, device_of, load_sae, select_hook
from metasae_lightning.evaluation.steering import MetaLatents, Mode, SteeredModel, change_latents, check_mode
from metasae_lightning.evaluation.text_reader import TextReader
from metasae_lightning.evaluation.top_contexts import Spelling
from metasae_lightning.report.example_texts import Example, examples_of
from metasae_lightning.report.load_runs import read_latents


@dataclass(frozen=True, eq=False, repr=False)
class TextActivations:
    """A text as tokens, with the activations of some latents on each."""

    tokens: tuple[str, ...]
    """Texts of the tokens, BOS included; a character that spans several tokens is in the last."""
    latents: tuple[int, ...]
    """Indices of the latents, in the order of the columns."""
    activations: Float[Tensor, "token latent"]
    """Activations on the CPU; 0 where a latent does not fire, and on every token that SAEs are not trained on."""
    is_trained_on: Bool[Tensor, " token"]
    """Mask of the tokens that SAEs are trained on: no special token, such as BOS, and no skipped position."""

    @property
    def peaks(self) -> dict[int, float]:
        """The largest activation of each latent; 0 if it does not fire."""
        return dict(zip(self.latents, self.activations.amax(0).tolist(), strict=True))

    def __repr__(self) -> str:
        """The text, and each latent with its largest activation."""
        peaks = ", ".join(f"{latent}: {value:.3g}" for latent, value in self.peaks.items())
        return f"TextActivations({''.join(self.tokens)!r}, peaks {{{peaks}}})"


@dataclass(frozen=True, repr=False)
class HeldOutContext:
    """Consecutive tokens of a held-out document around a token that a latent fires on."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    activations: tuple[float, ...]
    """Activation of the latent on each token, to three digits; 0 where it does not fire."""
    at: int
    """Index in `tokens` of the token that the context was chosen for."""
    position: int | None
    """Position of the first token among all held-out tokens that were read; None in records of older versions."""
    quantile: float | None
    """Share of the latent's firings that are at most as strong as the one at `at`; None in records of older versions."""

    @property
    def text(self) -> str:
        """The text of the tokens."""
        return "".join(self.tokens)

    def __repr__(self) -> str:
        """The text with the token that the latent fires on between « and », and the activation there."""
        before, after = "".join(self.tokens[: self.at]), "".join(self.tokens[self.at + 1 :])
        return f"HeldOutContext({f'{before}«{self.tokens[self.at]}»{after}'!r}, {self.activations[self.at]:.3g})"


@dataclass(frozen=True, repr=False)
class Latents:
    """The latents of one SAE. The language model is loaded when activations are first asked for."""

    subject: EvaluatedSAE
    """The SAE, with the folder of its results."""
    recipe: str | Path | None = field(default=None, kw_only=True)
    """A recipe with the model and the settings of contexts; None takes those of the SAE's run or metadata."""
    device: str | None = field(default=None, kw_only=True)
    """Device of the language model and of the SAE; None takes the recipe's."""

    def __len__(self) -> int:
        """Number of latents."""
        return len(self.subject.W_dec)

    def __repr__(self) -> str:
        """The place and the number of latents."""
        return f"Latents({self.subject.source!r}, {len(self)} latents)"

    def activations(self, texts: Sequence[str], latents: Iterable[SupportsIndex]) -> list[TextActivations]:
        """The activations of these latents on each text. Texts and latents keep their order.

        Each text is one document and one context, read as in training, with BOS in front. A text that is empty, or longer than the
        training's contexts, is an `InputError`. No text is cut or split: split it yourself where its parts make sense alone. Texts are
        read several at a time, which changes activations by rounding at most. The limit of norms, `max_norm_ratio`, is not applied.
        """
        # A text is a sequence of texts too, of its characters.
        if isinstance(texts, str):
            raise InputError(f"texts must be a list, got {texts!r:.60}: put one text in brackets")
        chosen, reader = tuple(map(self._checked, latents)), self._reader
        contexts = [reader.tokens(text, f"texts[{number}]") for number, text in enumerate(texts)]
        spelling, found = Spelling(reader.model.tokenizer), dict[int, TextActivations]()
        for index, rows in reader.activations(contexts):
            tokens = contexts[index]
            is_trained_on = reader.is_trained_on(tokens[None])[0]
            acts = self.subject.encode(rows, chosen).cpu() * is_trained_on[:, None]
            found[index] = TextActivations(tuple(spelling.token_texts(tokens.tolist())), chosen, acts, is_trained_on)
        return [found[index] for index in range(len(contexts))]

    def contexts(self, latent: SupportsIndex) -> list[HeldOutContext]:
        """The contexts of a latent that `metasae test` stored, strongest first: its strongest firings, and firings by quantile.

        Empty for a latent that never fired on the held-out text. An SAE that was not tested is an `InputError` with the command.
        The activations are those with the thresholds of `metasae test`, which may change thresholds when it measures several SAEs.
        """
        index, command = self._checked(latent), f"metasae test {self.subject.source}"
        record = self._record
        if record is None:
            raise InputError(f"{self.subject.folder} holds no contexts of latents: measure first, {command}")
        if (signs := record.get("by_polarity", False)) != self.subject.by_polarity:
            counted = "each sign of a latent" if signs else "both signs of a latent together"
            raise InputError(f"{self.subject.folder} was tested with {counted}: open_latents(..., by_polarity={signs})")
        if len(record["firings"]) != len(self):
            raise InputError(f"{self.subject.folder} holds contexts of another SAE, of {len(record['firings'])} latents: {command}")
        # A test may change thresholds, and never the decoder. Older records do not name it.
        if record.get("decoder", own := self.subject.decoder_cache_key["decoder"]) != own:
            raise InputError(f"{self.subject.folder} holds contexts of an SAE that has been trained anew since: {command}")
        examples = examples_of(record, index)
        if not examples and record["firings"][index]:
            raise InputError(f"{self.subject.folder} was measured without texts: {command} --contexts 3")
        return [held_out_context(example) for example in examples]

    def steered(self, numbers: Mapping[SupportsIndex, float], *, mode: Mode = "add", meta: bool = False) -> SteeredModel:
        """The complete language model, steered with some latents. What the SAE does not reconstruct stays in the activations.

        Args:
            numbers: A number for each latent that is changed; no latent changes nothing. Where the SAE gates latents in groups of `r`,
                these are the single latents: group `g` has those from `g r` to `(g + 1) r - 1`.
            mode: What the number does to the latent's activation: `add` is added to it, `scale` multiplies it, `set` replaces it.
            meta: Whether `numbers` names meta-latents, whose directions are shared by several latents (see `meta_latents`).
        """
        if self.subject.by_polarity:
            raise InputError("by_polarity: a latent is steered with the sign of its activation: open_latents(..., by_polarity=False)")
        count, kind = (len(self.meta_latents.W_dec), "meta-latent") if meta else (len(self.subject.decoder_rows), "latent")
        chosen = {check_index(latent, count, kind): float(number) for latent, number in numbers.items()}
        if wrong := [number for number in chosen.values() if not math.isfinite(number)]:
            raise InputError(f"numbers must be finite, got {wrong[0]}")
        change = partial(change_latents, numbers=chosen, mode=check_mode(mode))
        return SteeredModel(self._complete_reader, self.meta_latents if meta else self.subject.sae, change)

    @cached_property
    def meta_latents(self) -> MetaLatents:
        """The meta-latents of the SAE's run; an `InputError` if it has no meta-SAE."""
        return MetaLatents.of(self.subject)

    @cached_property
    def _complete_reader(self) -> TextReader:
        """A reader of texts with all layers of the language model."""
        reader = self._reader
        return TextReader(reader.model.complete(), reader.batching)

    @cached_property
    def _record(self) -> dict[str, Any] | None:
        """The content of `latents.json.gz`; None if there is no such file."""
        return read_latents(self.subject.folder)

    @cached_property
    def _reader(self) -> TextReader:
        """A reader of texts with the SAE's language model, which is loaded up to the hook."""
        data = data_for(self.subject, recipe=self.recipe, device=self.device)
        if not isinstance(data, ActivationsDataModule):
            raise InputError(f"{self.subject.source} reads activations without text, and activations() reads texts")
        select_hook(self.subject, data)
        self.subject.sae.to(device_of(data))
        data.language_model.check_context_size(data.batching.context_size)
        return TextReader(data.language_model, data.batching)

    def _checked(self, latent: SupportsIndex) -> int:
        """The index of a latent as an `int`; an `InputError` if the SAE has no such latent."""
        return check_index(latent, len(self), "latent")


def open_latents(
    place: str | Path,
    *,
    recipe: str | Path | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    by_polarity: bool = False,
) -> Latents:
    """The latents of the SAE in a run's or an arm's folder, in a SAELens folder, or on the Hub as `RELEASE:ID`.

    Args:
        place: The folder or the name. The folder of a run with several arms is an `InputError` that names them.
        recipe: A recipe with the language model and the settings of contexts, for an SAE whose folder does not name them.
        device: Device of the language model and of the SAE, such as `cuda:1`; by default the recipe's.
        out: The folder of results, if `metasae test` had the option `--out`.
        by_polarity: Whether each sign of a latent is a latent of its own, as after `metasae test --by_polarity true`: first all positive
            signs, then all negative ones.
    """
    subject = load_sae(str(place), out=out)
    return Latents(subject.divided_by_polarity() if by_polarity else subject, recipe=recipe, device=device)


def held_out_context(example: Example) -> HeldOutContext:
    """An example with at most `BEFORE` tokens before its own and `AFTER` after it: the record has no activations farther away."""
    begin, end = max(0, example.at - BEFORE), example.at + AFTER + 1
    tokens, fired = tuple(example.tokens[begin:end]), dict(example.fired)
    values = tuple(fired.get(begin + index, 0.0) for index in range(len(tokens)))
    position = None if example.start is None else example.start + begin
    return HeldOutContext(tokens, values, example.at - begin, position, example.quantile)


def check_index(latent: SupportsIndex, count: int, kind: str) -> int:
    """The index of one of `count` latents as an `int`; any other is an `InputError`, in which a latent is called `kind`."""
    index = operator.index(latent)
    if not 0 <= index < count:
        raise InputError(f"{kind} must be in 0 to {count - 1}, got {latent}")
    return index

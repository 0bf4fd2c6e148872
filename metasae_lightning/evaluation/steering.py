"""Steer a language model with latents or meta-latents of an SAE. The reconstruction error of the SAE stays in the activations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.errors import InputError, did_you_mean
from metasae_lightning.evaluation.saes import AT_ONCE, EvaluatedSAE
from metasae_lightning.evaluation.text_reader import TextReader
from metasae_lightning.lm.predictions import Edit
from metasae_lightning.run_folder import config_file, exported_sae, is_exported, model_args, read_config
from metasae_lightning.sae.pretrained import load_pretrained

Mode = Literal["add", "scale", "set"]
"""What a number does to an activation: it is added to it, multiplies it, or replaces it."""
ChangeOfCodes = Callable[[Float[Tensor, "row latent"]], Float[Tensor, "row latent"]]


@runtime_checkable
class Autoencoder(Protocol):
    """An SAE, or anything else with codes whose decoder is affine."""

    @property
    def W_dec(self) -> Float[Tensor, "latent d_in"]:
        """The decoder, one row a latent."""
        ...

    def encode(self, x: Float[Tensor, "row d_in"], /) -> Float[Tensor, "row latent"]:
        """The activations of the latents on raw activations of the language model."""
        ...

    def decode(self, feature_acts: Float[Tensor, "*rows latent"], /) -> Float[Tensor, "*rows d_in"]:
        """The reconstruction from the activations of the latents."""
        ...


def change_latents(acts: Float[Tensor, "row latent"], numbers: Mapping[int, float], mode: Mode = "add") -> Float[Tensor, "row latent"]:
    """Activations in which a number for each of some latents is added to its activation, multiplies it, or replaces it.

    >>> acts = torch.tensor([[1.0, 2.0, 0.0]])
    >>> [change_latents(acts, {1: 5.0, 2: 3.0}, mode).tolist() for mode in ("add", "scale", "set")]
    [[[1.0, 7.0, 3.0]], [[1.0, 10.0, 0.0]], [[1.0, 5.0, 3.0]]]
    """
    latents = torch.tensor(list(numbers), dtype=torch.long, device=acts.device)
    values, before = torch.tensor(list(numbers.values())).to(acts), acts.index_select(-1, latents)
    after = before + values if mode == "add" else before * values if mode == "scale" else values.expand_as(before)
    return acts.index_copy(-1, latents, after)


def steer(x: Float[Tensor, "row d_in"], autoencoder: Autoencoder, change: ChangeOfCodes) -> Float[Tensor, "row d_in"]:
    """`x + decode(change(f)) - decode(f)` for the codes `f = encode(x)`: the reconstruction error `x - decode(f)` stays.

    Codes that do not change leave `x` as it is, bit for bit. With `change(f) = f + s e_i` the result is `x + s W_dec[i]`, times the
    factor of the token where the SAE normalises each token. The result has a gradient with respect to what `change` computes.
    """
    acts = autoencoder.encode(x.to(autoencoder.W_dec.device)).to_dense()
    # A decoder is affine, so the difference of two reconstructions is `decode(change(f) - f) - decode(0)`, which has no rounding error of
    # the size of a reconstruction. Both are decoded in one call, since SAELens keeps the norms of tokens for one call of decode only.
    difference = change(acts) - acts
    changed, unchanged = autoencoder.decode(torch.stack([difference, torch.zeros_like(difference)]))
    return x + (changed - unchanged).to(x)


@dataclass(frozen=True)
class MetaLatents:
    """The meta-latents of a primary SAE as directions of the language model's activations.

    The meta-SAE reconstructs a unit decoder row as `W_i / ||W_i|| = sum_j m_ij M_j`, plus its bias and its error, with the rows `M` of
    its own decoder. So in the primary's part `sum_i f_i W_i` of an activation, `M_j` has the coefficient `sum_i f_i ||W_i|| m_ij`. This
    sum is taken as the activation of meta-latent j on a token. This definition is ours.
    """

    primary: Any
    """The primary SAE."""
    W_dec: Float[Tensor, "meta d_in"]
    """The meta-SAE's decoder, one row a meta-latent."""
    parts: Float[Tensor, "d_sae meta"]
    """How often each unit decoder row of the primary has each direction in it, `m_ij`: the meta-latent's activation on the row, times the
    row's factor where the meta-SAE normalises each row."""

    @classmethod
    def of(cls, subject: EvaluatedSAE) -> "MetaLatents":
        """The meta-latents of the run, or of the arm, that an SAE belongs to. An SAE without a meta-SAE is an `InputError`."""
        folder = Path(subject.source)
        if subject.run is None or not is_exported(folder, "meta"):
            raise InputError(f"{subject.source} has no folder saes/meta: it has no meta-SAE")
        if normalizer_of(subject) == "covariance_whitening":
            raise InputError(f"{subject.source} was trained on whitened activations: its meta-latents are no directions of the model")
        meta = load_pretrained(exported_sae(folder, "meta"), device=subject.W_dec.device)
        rows = functional.unit_rows(subject.decoder_rows.float())
        parts = torch.cat([parts_of_rows(meta, chunk) for chunk in rows.split(max(1, AT_ONCE // len(meta.W_dec)))])
        return cls(subject.sae, cast(Tensor, meta.W_dec).detach().float(), parts)

    def members(self, meta_latent: int) -> dict[int, float]:
        """The primary latents on whose decoder rows the meta-latent is active, with `m_ij` of each row, largest first."""
        values, latents = self.parts[:, meta_latent].sort(descending=True, stable=True)
        return {latent: value for latent, value in zip(latents.tolist(), values.tolist(), strict=True) if value > 0}

    def encode(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row meta"]:
        """The activations of the meta-latents on raw activations of the language model."""
        acts, lengths = self.primary.encode(x).to_dense().to(self.parts), self.primary.W_dec.detach().to(self.parts).norm(dim=1)
        return (acts * lengths) @ self.parts

    def decode(self, feature_acts: Float[Tensor, "*rows meta"]) -> Float[Tensor, "*rows d_in"]:
        """The sum of the meta-latents' directions, times the factor of the token where the primary normalises each token."""
        return self.primary.run_time_activation_norm_fn_out(feature_acts @ self.W_dec)


@torch.no_grad()
def parts_of_rows(meta: Any, rows: Float[Tensor, "row d_in"]) -> Float[Tensor, "row meta"]:
    """The activations of a meta-SAE on some rows, each times the factor by which its normaliser multiplies the row's reconstruction."""
    acts = meta.encode(rows).to_dense().float()
    # The normaliser's way back is affine with one factor for all coordinates of a row. Both are computed in one call, since SAELens forgets
    # the norms of rows after one.
    one, zero = meta.run_time_activation_norm_fn_out(torch.stack([torch.ones_like(rows), torch.zeros_like(rows)]))
    return acts * (one - zero)[:, :1].to(acts)


def normalizer_of(subject: EvaluatedSAE) -> str | None:
    """The normaliser in the recipe of an SAE's run; None if the recipe names none."""
    model = model_args(read_config(config_file(subject.run))) if subject.run and config_file(subject.run).exists() else {}
    arm = ((model.get("arms") or {}).get(subject.arm) or {}).get("init_args") if subject.arm else model
    primary = (arm or {}).get("primary") or {}
    return (primary.get("init_args") or {}).get("normalize_activations") if isinstance(primary, dict) else None


@dataclass(frozen=True)
class SteeredModel:
    """A complete language model in which the codes of an SAE are changed at every token that the SAE is trained on."""

    reader: TextReader
    """Reader of texts with the complete language model."""
    autoencoder: Autoencoder
    """The SAE, or the meta-latents, whose codes are changed."""
    change: ChangeOfCodes
    """A function from the activations of all latents to the changed ones."""

    def edit(self, tokens: Int[Tensor, "context position"]) -> Edit:
        """The edit of the activations on these tokens, for `LanguageModel.logits`."""
        positions = self.reader.is_trained_on(tokens).flatten().nonzero().flatten()

        def edit(activations: Tensor) -> Tensor:
            rows, places = activations.flatten(0, 1), positions.to(activations.device)
            chunks = rows.index_select(0, places).split(max(1, AT_ONCE // len(self.autoencoder.W_dec)))
            steered = torch.cat([steer(chunk, self.autoencoder, self.change) for chunk in chunks])
            return rows.index_copy(0, places, steered).view_as(activations)

        return edit

    def logits(self, text: str) -> Float[Tensor, "position vocabulary"]:
        """The logits on the tokens of a text, BOS included."""
        tokens = self.reader.tokens(text)[None]
        return self.reader.model.logits(tokens, edit=self.edit(tokens))[0]

    def next_tokens(self, text: str, count: int = 5) -> list[tuple[str, float]]:
        """The most likely next tokens after a text with their probabilities, most likely first."""
        return most_likely(self.reader, self.logits(text)[-1], count)

    def continuation(self, text: str, count: int = 20) -> str:
        """The text of the most likely next tokens, one after another, up to the end of the text or of the context."""
        tokens = self.reader.tokens(text)
        return self.reader.text_after(tokens, self.reader.greedy(tokens, count, self.edit))


def most_likely(reader: TextReader, logits: Float[Tensor, " vocabulary"], count: int) -> list[tuple[str, float]]:
    """The `count` most likely tokens with their probabilities, most likely first."""
    probabilities, tokens = logits.softmax(-1).topk(count)
    return [(reader.model.tokenizer.decode([token]), value) for token, value in zip(tokens.tolist(), probabilities.tolist(), strict=True)]


def check_mode(mode: str) -> Mode:
    """The mode; an `InputError` for any other word."""
    if mode not in get_args(Mode):
        raise InputError(f"mode must be {', '.join(get_args(Mode))}, got {mode!r}{did_you_mean(mode, get_args(Mode))}")
    return cast(Mode, mode)

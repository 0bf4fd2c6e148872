"""Contexts of a latent: parts of documents in which it fires, or in which it does not."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Context:
    """Consecutive tokens of one document, with one latent's activations."""

    document: int
    """Document id."""
    tokens: tuple[str, ...]
    """Texts of the tokens; a special token is its name, such as `<|endoftext|>`."""
    activations: tuple[float, ...]
    """Activation of the latent on each token; 0 where it does not fire."""
    nearest_activations: tuple[float, ...] = ()
    """For the contexts `LatentContexts.near`: activation of the latent with the nearest decoder row on each token; else empty."""

    @property
    def text(self) -> str:
        """The text of the context."""
        return "".join(self.tokens)

    @property
    def peak(self) -> float:
        """The largest activation; 0 if the latent does not fire."""
        return max(self.activations, default=0.0)


@dataclass(frozen=True)
class LatentContexts:
    """The contexts that one latent is explained and scored by. Those in `explaining` share no document with the others."""

    latent: int
    """Index of the latent."""
    density: float
    """Share of the counted tokens on which it fires."""
    explaining: Sequence[Context]
    """Contexts for the explanation in which the latent fires, strongest first."""
    firing: Sequence[Context]
    """Contexts for the scores in which the latent fires, from all quantiles of its activation, strongest first."""
    silent: Sequence[Context]
    """Random contexts for the scores in which the latent does not fire."""
    near: Sequence[Context]
    """Contexts for the scores in which the latent with the nearest decoder row fires and this latent does not."""
    nearest: int | None = None
    """The latent with the nearest decoder row; None if no other latent fires."""

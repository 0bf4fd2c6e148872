"""The units of an SAE, which every measure of firings counts: latents, groups of latents, or signs of latents."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metasae_lightning.errors import InputError

# SAELens's architectures whose activations may be negative.
SIGNED = ("abstopk",)


@dataclass(frozen=True)
class Units:
    """The units of an SAE. Every measure of firings counts units.

    By default a unit is a latent. Where latents are gated in groups (`cfg.group_size` > 1), a unit is a group, and its activation is the
    norm of the group's activations. Where activations are signed (`cfg.has_signed_codes`), a latent fires with either sign, and its
    activation is the magnitude; with `by_polarity` each sign is a unit.

    >>> units = Units(d_sae=4, group_size=2)
    >>> units.count, units.activations(torch.tensor([[3.0, -4.0, 0.0, 0.0]])).tolist()
    (2, [[5.0, 0.0]])
    >>> Units(d_sae=2, is_signed=True, by_polarity=True).activations(torch.tensor([[-2.0, 1.0]])).tolist()
    [[0.0, 1.0, 2.0, 0.0]]
    """

    d_sae: int
    """Number of latents."""
    group_size: int = 1
    """Number of latents in a group that is gated as one."""
    is_signed: bool = False
    """Whether activations of single latents may be negative."""
    by_polarity: bool = False
    """Whether the positive and the negative activations of a latent are two units: first all positive ones, then all negative ones."""

    @classmethod
    def of(cls, cfg: Any, *, by_polarity: bool = False) -> "Units":
        """The units of an SAE, from its SAELens config. `by_polarity` needs signed activations, else it is an `InputError`."""
        group_size = getattr(cfg, "group_size", 1)
        is_signed = group_size == 1 and (getattr(cfg, "has_signed_codes", False) or cfg.architecture() in SIGNED)
        if by_polarity and not is_signed:
            raise InputError(f"by_polarity: a {cfg.architecture()!r} SAE has no latents with activations of both signs")
        return cls(cfg.d_sae, group_size, is_signed, by_polarity)

    @property
    def count(self) -> int:
        """Number of units."""
        return 2 * self.d_sae if self.by_polarity else self.d_sae // self.group_size

    def activations(self, feature_acts: Float[Tensor, "row d_sae"]) -> Float[Tensor, "row unit"]:
        """The activations of units, which are not negative, from those of latents."""
        if self.group_size > 1:
            return feature_acts.unflatten(-1, (-1, self.group_size)).norm(dim=-1)
        if self.by_polarity:
            return torch.cat([feature_acts.clamp(min=0), (-feature_acts).clamp(min=0)], -1)
        return feature_acts.abs() if self.is_signed else feature_acts

    def select(self, feature_acts: Float[Tensor, "row d_sae"], firings: Any, keep: Bool[Tensor, " nnz"]) -> Float[Tensor, "row d_sae"]:
        """The activations of latents, without those of the units in `firings` (the nonzeros of `activations`) for which `keep` is false."""
        mask = torch.zeros(feature_acts.shape[0], self.count, dtype=torch.bool, device=feature_acts.device)
        mask[firings.rows, firings.latents] = keep
        if self.by_polarity:
            mask = torch.where(feature_acts > 0, mask[:, : self.d_sae], mask[:, self.d_sae :])
        return feature_acts * mask.repeat_interleave(self.group_size, 1)

    def directions(self, W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "unit d_in"]:
        """One direction of the decoder for each unit.

        That of a group is the unit vector along which its rows have the largest sum of squares; that of a negative polarity is minus the
        row.
        """
        if self.group_size > 1:
            blocks = W_dec.float().unflatten(0, (-1, self.group_size))
            return (self._group_codes(blocks)[:, None] @ blocks)[:, 0].to(W_dec.dtype)
        return torch.cat([W_dec, -W_dec]) if self.by_polarity else W_dec

    def codes_of_direction(self, unit: int, W_dec: Float[Tensor, "d_sae d_in"]) -> dict[int, float]:
        """The activations of latents whose decoder rows sum to the direction of a unit.

        >>> Units(d_sae=2, is_signed=True, by_polarity=True).codes_of_direction(3, torch.eye(2))
        {1: -1.0}
        """
        if self.group_size == 1:
            return {unit % self.d_sae: -1.0 if unit >= self.d_sae else 1.0}
        first = unit * self.group_size
        (codes,) = self._group_codes(W_dec[first : first + self.group_size].float()[None])
        return dict(enumerate(codes.tolist(), first))

    def _group_codes(self, blocks: Float[Tensor, "group latent d_in"]) -> Float[Tensor, "group latent"]:
        """For each block of rows, the activations `c` for which `c W` is its direction."""
        # From the small Gram matrix of each block: its first left singular vector u gives the direction u W / ||u W||.
        u = torch.linalg.eigh(blocks @ blocks.mT).eigenvectors[..., -1]
        rows = (u[:, None] @ blocks)[:, 0]
        # Of the two signs, the one that agrees with the sum of the rows.
        signs = torch.where((rows * blocks.sum(1)).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        return u * (signs / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12))

"""Codes in tensors of a fixed size, so that the host need not wait for the number of active latents."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.step import Codes


@dataclass(frozen=True)
class PaddedCodes:
    """The nonzero activations of each token, followed by zeros.

    A token with more active latents than there is room for keeps the first of them; its entry of `lengths` counts all.

    >>> padded = PaddedCodes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 1.0]]), room=2)
    >>> padded.latents.tolist(), padded.values.tolist(), padded.lengths.tolist()
    ([[1, 0], [0, 2]], [[2.0, 0.0], [3.0, 1.0]], [1, 2])
    """

    latents: Int[Tensor, "row room"]
    """The active latents of each token, ascending; 0 in free places."""
    values: Float[Tensor, "row room"]
    """Their activations; 0 in free places."""
    lengths: Int[Tensor, " row"]
    """Number of active latents of each token."""
    d_sae: int
    """Number of latents."""

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "row d_sae"], room: int) -> "PaddedCodes":
        """The codes of a dense matrix of activations."""
        active_up_to = (acts != 0).cumsum(1, dtype=torch.int32)
        place = torch.arange(1, room + 1, dtype=torch.int32, device=acts.device).expand(len(acts), -1).contiguous()
        lengths = active_up_to[:, -1]
        is_filled = place <= lengths[:, None]
        latents = torch.searchsorted(active_up_to, place).where(is_filled, 0)
        return cls(latents, acts.gather(1, latents).where(is_filled, 0.0), lengths.long(), acts.shape[1])

    @classmethod
    def concatenate(cls, parts: "list[PaddedCodes]") -> "PaddedCodes":
        """The codes of the tokens of all parts, in order. All parts have the same room, and so has the result."""
        latents, values, lengths = (torch.cat([getattr(part, name) for part in parts]) for name in ("latents", "values", "lengths"))
        return cls(latents, values, lengths, parts[0].d_sae)

    def with_zeros(self) -> Codes:
        """The codes in which each free place is an entry of latent 0 with the value 0."""
        rows, room = self.latents.shape
        tokens = torch.arange(rows, device=self.latents.device).repeat_interleave(room, output_size=rows * room)
        return Codes(tokens, self.latents.flatten(), self.values.flatten(), (rows, self.d_sae))


def room_for(lengths: Int[Tensor, " row"]) -> int:
    """Room for the active latents of similar tokens: twice the largest of `lengths`, rounded up to a multiple of 32; at least 32.

    >>> room_for(torch.tensor([3, 17]))
    64
    """
    return -(-2 * int(lengths.max()) // 32) * 32 if len(lengths) and lengths.max() else 32

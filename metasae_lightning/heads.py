"""Heads on codes: a second path from the codes to the reconstruction, beside the decoder and apart from it."""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.step import Codes


class Head(nn.Module, ABC):
    """A function of the codes that is added to the SAE's reconstruction, in the space of its normaliser.

    A head is trained with an SAE and saved beside it. It is never part of the exported SAE.
    """

    @abstractmethod
    def build(self, d_sae: int, d_in: int) -> None:
        """Make the parameters for these sizes, in torch's default type and on its default device. Its output is 0 until it is trained."""

    def initialize(self, codes: Codes) -> None:
        """Initialise the parts that depend on the first codes of training; called once. By default there are none."""

    @property
    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The arguments of the class, by name, for building this head again."""

    @abstractmethod
    def forward(self, codes: Codes) -> Float[Tensor, "row d_in"]:
        """The output for each row. The codes are the latents' activations, which may be negative; some entries may be 0."""


@final
class InteractionHead(Head):
    """Pairwise interactions of the active latents, of low rank, and a map from them to the activations.

    Each latent has an embedding `v_i`. The interactions are `u = sum_(i<j) f_i f_j v_i v_j`, divided by their root mean square over the
    first rows, and the output is `W_2 relu(W_1 u + b_1)`, or `W u` where `hidden` is null. `W_2` and `W` start at 0.

    This is our reconstruction of the head of Feature Integration Spaces (arXiv 2507.00269), whose full text and code we have not read.

    Args:
        rank: Size of a latent's embedding.
        hidden: Hidden units of the map; null makes it linear.
    """

    embeddings: nn.Parameter
    scale: Tensor

    def __init__(self, rank: int = 16, hidden: int | None = 64) -> None:
        super().__init__()
        if rank < 1 or (hidden is not None and hidden < 1):
            raise InputError(f"InteractionHead: rank and hidden must be at least 1, got {rank} and {hidden}")
        self.rank, self.hidden = rank, hidden

    @property
    def arguments(self) -> dict[str, Any]:
        """Rank and hidden units."""
        return {"rank": self.rank, "hidden": self.hidden}

    def build(self, d_sae: int, d_in: int) -> None:
        """Draw embeddings of mean length 1 and the hidden layer; the last layer is 0."""
        self.embeddings = nn.Parameter(torch.randn(d_sae, self.rank) / self.rank**0.5)
        self.register_buffer("scale", torch.ones(()))
        # The last layer has no bias: a constant offset is the SAE's b_dec and no interaction.
        last = nn.Linear(self.hidden or self.rank, d_in, bias=False)
        nn.init.zeros_(last.weight)
        self.map = last if self.hidden is None else nn.Sequential(nn.Linear(self.rank, self.hidden), nn.ReLU(), last)

    @torch.no_grad()
    def initialize(self, codes: Codes) -> None:
        """Set the scale of the interactions to their root mean square; 1 where no row has two active latents."""
        size = self._interactions(codes).square().mean().sqrt()
        self.scale.copy_(torch.where(size > 0, size, 1.0))

    def forward(self, codes: Codes) -> Float[Tensor, "row d_in"]:
        """The output for each row."""
        return self.map(self._interactions(codes) / self.scale)

    def _interactions(self, codes: Codes) -> Float[Tensor, "row rank"]:
        return functional.pairwise_interactions(codes.latents, codes.values.to(self.embeddings.dtype), codes.lengths(), self.embeddings)

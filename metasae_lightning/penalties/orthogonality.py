"""OrtSAE's penalty: the squared cosine of each decoder row to its nearest."""

from typing import final

from jaxtyping import Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.gpu.neighbours import sum_of_squared_cosines
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_chunks import is_blocked, step_permutation
from metasae_lightning.compute.sharding import full, local
from metasae_lightning.compute.transfers import copy_to
from metasae_lightning.errors import InputError
from metasae_lightning.penalties.base import Critic, Penalty


@final
class Orthogonality(Penalty):
    """Mean squared cosine between each row and its nearest neighbour in a random chunk of rows (arXiv 2509.22033).

    Chunks are drawn anew at each step. With `every` > 1 the penalty acts at every `every`-th step only, `every` times as strongly.
    """

    def __init__(self, weight: float = 0.25, chunk_size: int = 8192, every: int = 1, seed: int = 0, warm_up_steps: int = 0) -> None:
        super().__init__(weight, warm_up_steps)
        if chunk_size < 2 or every < 1:
            raise InputError(f"Orthogonality: chunk_size must be at least 2 and every at least 1, got {chunk_size} and {every}")
        self.chunk_size, self.every, self.seed = chunk_size, every, seed

    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """The mean squared cosine of each row to its nearest neighbour in its chunk, times `every`; 0 at the steps between.

        The chunks are drawn anew at each step.
        """
        return self.rank_share(W_dec, critic, step, Parallelism())

    def rank_share(
        self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, parallelism: Parallelism
    ) -> Float[Tensor, ""]:
        """This rank's share of the penalty; the shares of all ranks add up to `forward`.

        It is the sum of squared cosines over this rank's slice of every chunk, times `every`, divided by the number of all rows. Neighbours
        are searched in the whole chunk.
        """
        if step % self.every:
            return local(W_dec).new_zeros(())
        W_dec = full(W_dec)
        permuted = copy_to(step_permutation(len(W_dec), step=step, seed=self.seed), W_dec.device)
        if not is_blocked(W_dec):
            chunk_size = -(-len(permuted) // -(-len(permuted) // self.chunk_size))
            total = sum_of_squared_cosines(functional.unit_rows(W_dec), permuted, chunk_size, parallelism.world)
            return total * (self.every / len(W_dec))
        chunks = list(permuted.chunk(-(-len(permuted) // self.chunk_size)))
        shares = [parallelism.world.even_slice(len(chunk)) for chunk in chunks]
        return self.every * functional.orthogonality(W_dec, chunks, shares).sum() / len(W_dec)

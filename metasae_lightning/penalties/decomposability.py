"""The paper's penalty: how well the meta SAE reconstructs the primary's decoder rows."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.buffers import SHARED, buffer_or_new
from metasae_lightning.compute.gpu.passes import passes_for
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_chunks import is_blocked, mean_over_rows, step_permutation
from metasae_lightning.compute.row_passes import write_unit_rows
from metasae_lightning.compute.sharding import local, local_rows
from metasae_lightning.errors import InputError
from metasae_lightning.penalties.base import Critic, Penalty


@final
class Decomposability(Penalty):
    """Mean decomposability of decoder rows by the critic, `mean_i exp(-||W_i/||W_i|| - What_i||^2 / sigma_sq)` (arXiv 2604.03436).

    With `rows` < 1 the mean is over that fraction of the rows, drawn anew at each step. This is cheaper and noisy. It is unbiased, except
    that a batch top-k critic sets its threshold from the drawn rows only.
    """

    needs_critic = True

    def __init__(self, weight: float, sigma_sq: float = 1.0, warm_up_steps: int = 0, rows: float = 1.0, seed: int = 0) -> None:
        super().__init__(weight, warm_up_steps)
        if sigma_sq <= 0:
            raise InputError(f"Decomposability: sigma_sq must be positive, got {sigma_sq}")
        if not 0 < rows <= 1:
            raise InputError(f"Decomposability: rows is the fraction of decoder rows that a step uses, above 0 and up to 1, got {rows}")
        self.sigma_sq, self.rows, self.seed = sigma_sq, rows, seed
        self.uses_step = rows < 1

    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """Mean decomposability of all rows, or of the rows drawn for this step."""
        return self.rank_share(W_dec, critic, step, Parallelism())

    def rank_share(
        self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, parallelism: Parallelism
    ) -> Float[Tensor, ""]:
        """This rank's share of the penalty; the shares of all ranks add up to its mean over the rows of the step."""
        assert critic is not None
        drawn, count, decoder = None, len(W_dec), local(W_dec)
        if self.rows < 1:
            count = max(1, round(self.rows * len(W_dec)))
            drawn = step_permutation(len(W_dec), step=step, seed=self.seed)[:count]
        indices = local_rows(W_dec, drawn, parallelism)
        with torch.no_grad():
            rows = decoder if indices is None else decoder.index_select(0, indices)
            reconstruction = critic(write_unit_rows(rows, buffer_or_new(SHARED, "unit", rows.shape, rows)))
        formula = functional.decomposability_with_slope if is_blocked(decoder) else passes_for(decoder).decomposability

        def value_and_slope(chunk: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
            return formula(chunk, rebuilt.to(chunk.dtype), self.sigma_sq)

        mean = mean_over_rows(value_and_slope, decoder, reconstruction, indices)
        return mean if parallelism.world.is_single else mean * (len(reconstruction) / count)

"""The paper's penalty: how well the meta SAE reconstructs the primary's decoder rows, or its blocks of rows."""

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.buffers import SHARED, buffer_or_new
from metasae_lightning.compute.gpu.passes import passes_for
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_chunks import ValueAndSlope, is_blocked, mean_over_rows, step_permutation
from metasae_lightning.compute.row_passes import write_unit_rows
from metasae_lightning.compute.sharding import local, local_rows
from metasae_lightning.errors import InputError
from metasae_lightning.functional.penalties import block_decomposability_with_slope
from metasae_lightning.penalties.base import Critic, Penalty


@final
class Decomposability(Penalty):
    """Mean decomposability of decoder rows by the critic, `mean_i exp(-||W_i/||W_i|| - What_i||^2 / sigma_sq)` (arXiv 2604.03436).

    Where the primary gates its rows in blocks, `unit` is the unit that is judged; without blocks it is the row. `row`: each row, as
    the paper has it, which also punishes a block for holding several directions of one subspace. `block`: `exp(-e_g / sigma_sq)` with the
    mean error `e_g` of the block's rows. A block counts as decomposable only if all of its rows are, and the rows of a block that share a
    meta latent still lower each other's error. `masked_block` (default): as `block`, with the reconstruction by those meta latents alone
    that are active on rows of several blocks. A meta latent that is active on one block alone then costs nothing. Units other than the row
    are our reconstruction: no paper defines the penalty for blocks.

    With `rows` < 1 the mean is over that fraction of the rows or blocks, drawn anew at each step. This is cheaper and noisy. It is
    unbiased, except that a batch top-k critic sets its threshold from the drawn rows only, and that `masked_block` compares drawn blocks.
    """

    needs_critic = True

    def __init__(
        self,
        weight: float,
        sigma_sq: float = 1.0,
        warm_up_steps: int = 0,
        rows: float = 1.0,
        seed: int = 0,
        unit: Literal["row", "block", "masked_block"] = "masked_block",
    ) -> None:
        super().__init__(weight, warm_up_steps)
        if sigma_sq <= 0:
            raise InputError(f"Decomposability: sigma_sq must be positive, got {sigma_sq}")
        if not 0 < rows <= 1:
            raise InputError(f"Decomposability: rows is the fraction of decoder rows that a step uses, above 0 and up to 1, got {rows}")
        if unit not in ("row", "block", "masked_block"):
            raise InputError(f"Decomposability: unit must be row, block or masked_block, got {unit!r}")
        self.sigma_sq, self.rows, self.seed, self.unit = sigma_sq, rows, seed, unit
        self.uses_step = rows < 1

    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """Mean decomposability of all rows or blocks, or of those drawn for this step."""
        return self.rank_share(W_dec, critic, step, Parallelism())

    def rank_share(
        self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, parallelism: Parallelism
    ) -> Float[Tensor, ""]:
        """This rank's share of the penalty; the shares of all ranks add up to its mean over the rows or blocks of the step."""
        assert critic is not None
        size = 1 if self.unit == "row" else self.group_size
        # A block is one long row. The latents of a primary with blocks are not divided among ranks.
        units = W_dec if size == 1 else W_dec.flatten().view(-1, size * W_dec.shape[1])
        drawn, count, decoder = None, len(units), local(units)
        if self.rows < 1:
            count = max(1, round(self.rows * len(units)))
            drawn = step_permutation(len(units), step=step, seed=self.seed)[:count]
        indices = local_rows(units, drawn, parallelism)
        with torch.no_grad():
            rows = (decoder if indices is None else decoder.index_select(0, indices)).view(-1, W_dec.shape[1])
            unit_rows = write_unit_rows(rows, buffer_or_new(SHARED, "unit", rows.shape, rows))
            if size > 1 and self.unit == "masked_block":
                blocks = torch.arange(len(units), device=rows.device) if indices is None else indices
                reconstruction = critic(unit_rows, blocks.repeat_interleave(size))
            else:
                reconstruction = critic(unit_rows)
            reconstruction = reconstruction.view(-1, decoder.shape[1])
        mean = mean_over_rows(self._block_formula(size) if size > 1 else self._row_formula(decoder), decoder, reconstruction, indices)
        return mean if parallelism.world.is_single else mean * (len(reconstruction) / count)

    def _row_formula(self, decoder: Tensor) -> ValueAndSlope:
        """The decomposability of rows, with its gradient."""
        formula = functional.decomposability_with_slope if is_blocked(decoder) else passes_for(decoder).decomposability
        return lambda chunk, rebuilt: formula(chunk, rebuilt.to(chunk.dtype), self.sigma_sq)

    def _block_formula(self, size: int) -> ValueAndSlope:
        """The decomposability of blocks of `size` rows, each given as one long row, with its gradient."""

        def value_and_slope(chunk: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
            blocks, others = (tensor.view(len(chunk), size, -1) for tensor in (chunk, rebuilt.to(chunk.dtype)))
            p, slope = block_decomposability_with_slope(blocks, others, self.sigma_sq)
            return p, slope.view_as(chunk)

        return value_and_slope

"""Top-k over groups of latents by the norm of a group's pre-activations, without the full matrix of pre-activations."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_chunks import is_blocked, scaled_size
from metasae_lightning.compute.sparse_matrix import Pattern
from metasae_lightning.compute.topk import TopK, largest_indices
from metasae_lightning.compute.topk_across_ranks import topk_across_ranks

# Pre-activations of a block: they stay in the processor's cache on a CPU, and fit in a GPU's memory beside the batch.
BLOCK, GPU_BLOCK = 4 * 2**20, 2**28


@dataclass
class GroupRule:
    """Which groups of latents are active: with `per_row` the `k` largest norms of each row, else the `k * rows` largest of the batch."""

    k: float
    group_size: int
    per_row: bool
    parallelism: Parallelism = field(default_factory=Parallelism)
    """Its `world`: the ranks whose batches share one threshold."""


class GroupEncoder:
    """Pre-activations `x W_enc + b_enc` of a batch, computed and searched for the groups of largest norm in blocks of rows.

    Args:
        x: The batch.
        W_enc: The encoder; the latents of a group are neighbours.
        b_enc: The encoder's bias. All results have its data type, except the product `x W_enc`.
        extra_latents: The latents whose pre-activations on every row the search stores in `extra_pre_acts`.
    """

    def __init__(self, x: Tensor, W_enc: Tensor, b_enc: Tensor, extra_latents: Int[Tensor, " extra"]) -> None:
        device = x.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else b_enc.dtype
        self.x, self.W_enc, self.b_enc = x.to(product_dtype), W_enc.to(product_dtype), b_enc
        self.extra_latents, self.extra_pre_acts = extra_latents, b_enc.new_zeros(len(x), len(extra_latents))

    def top_k(self, rule: GroupRule) -> TopK:
        """The latents of the active groups. A group whose norm is 0 is not active.

        The threshold is the smallest active norm of the batch, and None with `per_row`. With several ranks the batch is that of all ranks.
        """
        squares, found = self._search(rule)
        if found is not None:
            return TopK(*found, threshold=None)
        count = rule.k * rule.parallelism.world.sum_scalar(len(self.x), self.b_enc)
        if rule.parallelism.world.is_single:
            indices = largest_indices(squares.flatten(), int(count))
            indices = indices[squares.flatten()[indices] > 0].sort().values
            least = squares.flatten()[indices].amin() if len(indices) else None
        else:
            mask = topk_across_ranks(squares.flatten(), int(count), rule.parallelism.world)
            indices, least = mask.keep.nonzero().flatten(), mask.threshold
        rows, groups = indices // squares.shape[1], indices % squares.shape[1]
        rows, columns = _latents(rows, groups, rule.group_size)
        pattern = Pattern(rows, columns, (len(self.x), self.W_enc.shape[1]))
        with torch.autocast(self.x.device.type, enabled=False):
            values = pattern.sampled(self.x, self.W_enc.T.contiguous()).to(self.b_enc.dtype) + self.b_enc[columns]
        return TopK(values, rows, columns, None if least is None else self._read(least.sqrt()))

    def _search(self, rule: GroupRule) -> tuple[Float[Tensor, "row group"], tuple[Tensor, Tensor, Tensor] | None]:
        """The squared norms of groups; with `per_row` the values, rows and columns of the active latents instead."""
        n_rows, n_latents = len(self.x), self.W_enc.shape[1]
        n_groups, ones = n_latents // rule.group_size, self.b_enc.new_ones(rule.group_size, 1)
        squares = self.b_enc.new_empty(0 if rule.per_row else n_rows, n_groups)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        step = max(1, scaled_size(BLOCK if is_blocked(self.x) else GPU_BLOCK) // n_latents)
        for top in range(0, n_rows, step):
            with torch.autocast(self.x.device.type, enabled=False):
                block = self.x[top : top + step] @ self.W_enc + self.b_enc
                # On a CPU this takes half the time of a sum over so short a dimension.
                block_squares = (block.square().view(-1, rule.group_size) @ ones).view(len(block), n_groups)
            if len(self.extra_latents):
                torch.index_select(block, 1, self.extra_latents, out=self.extra_pre_acts[top : top + step])
            if not rule.per_row:
                squares[top : top + step] = block_squares
                continue
            chosen = block_squares.topk(int(rule.k), sorted=False).indices.sort().values
            row, candidate = (block_squares.gather(1, chosen) > 0).nonzero(as_tuple=True)
            rows, columns = _latents(row, chosen[row, candidate], rule.group_size)
            parts.append((block[rows, columns], rows + top, columns))
        if not rule.per_row:
            return squares, None
        if not parts:
            empty = self.extra_latents[:0]
            return squares, (self.b_enc.new_empty(0), empty, empty)
        values, rows, columns = map(torch.cat, zip(*parts, strict=True))
        return squares, (values, rows, columns)

    def _read(self, threshold: Tensor) -> float | Tensor | None:
        """The threshold: a number on a CPU, a tensor on a GPU; None on a CPU where no group of any rank is active."""
        if not is_blocked(self.x):
            return threshold
        value = threshold.item()
        return None if value == torch.inf else value


def _latents(rows: Tensor, groups: Tensor, group_size: int) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """The row and the column of each latent of some groups, in the order of the groups."""
    offsets = torch.arange(group_size, device=groups.device)
    return rows.repeat_interleave(group_size), (groups[:, None] * group_size + offsets).flatten()

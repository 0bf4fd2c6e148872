"""Top-k over the pre-activations of a batch, without the full matrix of pre-activations and without ranking all of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.compute.process_group import Parallelism, ProcessGroup
from metasae_lightning.compute.row_chunks import is_blocked, scaled_size
from metasae_lightning.compute.topk_across_ranks import topk_across_ranks

# The sample from which a threshold is estimated: one value in STRIDE of a given vector; SAMPLED_ROWS rows of a batch without a hint.
STRIDE, SAMPLED_ROWS = 31, 32
# Pre-activations per block on a CPU: a block stays in the processor's cache until it has been searched. Further rows would only make the
# blocks narrower, and the speed of a product depends on its shorter side.
BLOCK, BLOCK_ROWS = 4 * 2**20, 4096
# How many times larger the blocks of a top-k per row are. They hold whole rows, and short blocks would read the encoder again and again.
ROW_BLOCK_FACTOR = 4
# The search starts at this fraction of the last batch's threshold.
HINT_FACTOR = 0.93
# The candidates are reduced to the `count` largest as soon as there are more than `MAX_SURPLUS * count` of them.
MAX_SURPLUS = 3
# Relative amount by which a threshold is lowered before a comparison: the same number, computed in another order, may differ in its last
# bits.
SLACK = 1e-5

Selection = tuple[Tensor, Tensor, Tensor]
"""Scaled activations, raw activations, and their flat indices `row * n_latents + latent`."""


def largest_indices(values: Float[Tensor, " value"], count: int) -> Int[Tensor, " selected"]:
    """Indices of the `count` largest values, in any order. No value may be negative.

    If fewer than `count` values are positive, the result on a CPU has the positive ones only; on a GPU zeros fill it up.

    On a CPU a sample of the values gives an estimate of the threshold that is a little too low, and only the values above the estimate are
    ranked. If the estimate was too high, all positive values are ranked. The result is that of `topk`, except for the choice among equals.

    >>> sorted(largest_indices(torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0]), 2).tolist()), largest_indices(torch.zeros(3), 2).tolist()
    ([1, 4], [])
    """
    if not is_blocked(values):  # a GPU ranks all values in less time than it waits for an estimate
        return values.topk(count).indices
    candidates = (values > _threshold_estimate(values[::STRIDE], count / STRIDE)).nonzero().flatten()
    if len(candidates) < count:
        candidates = values.nonzero().flatten()
    return candidates if len(candidates) <= count else candidates[values[candidates].topk(count, sorted=False).indices]


class TopK(NamedTuple):
    """The top-k latents of a batch, ordered by row, then by latent."""

    values: Float[Tensor, " nnz"]
    """Activations, before any scale."""
    rows: Int[Tensor, " nnz"]
    columns: Int[Tensor, " nnz"]
    threshold: float | Tensor | None
    """The smallest selected activation, with its scale, over all ranks; None if top-k runs per row or selects nothing.

    On a GPU it is a tensor; with several ranks it is infinite where nothing is selected.
    """


class BlockwiseEncoder:
    """Activations `(x W_enc + b_enc) * scale` of a batch on a CPU, computed and searched in blocks that stay in the processor's cache.

    Args:
        x: The batch.
        W_enc: The encoder.
        b_enc: The encoder's bias. All results have its data type, except the product `x W_enc`.
        scale: Factors that affect the ranking and the threshold, and not the returned values; None is 1.
        extra: Mask of the latents whose pre-activations on every row the search stores in `extra_pre_acts`; None is no latent.
        parallelism: Its `world` are the ranks whose batches share one threshold, its `tensor_group` those with other latents of the same
            rows.
    """

    def __init__(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, extra: Tensor | None, parallelism: Parallelism
    ) -> None:
        device = x.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else b_enc.dtype
        self.x, self.W_enc, self.b_enc, self.scale = x.to(product_dtype), W_enc.to(product_dtype), b_enc, scale
        self.extra_latents = torch.empty(0, dtype=torch.long) if extra is None else extra.nonzero().flatten()
        self.extra_pre_acts = b_enc.new_zeros(len(x), len(self.extra_latents))
        self.n_rows, self.n_latents = len(x), W_enc.shape[1]
        self.world, self.tensor_group = parallelism.world, parallelism.tensor_group

    def top_k(self, k: float, *, per_row: bool, hint: float | None) -> TopK:
        """With `per_row` the `k` largest positive values of each row, else the `k * rows` largest positive values of the batch.

        With several ranks the result is this rank's part of the top-k over all of them. `hint` is the threshold of a similar batch, and is
        not used with `per_row`. A good hint saves time; a bad one does not change the result.
        """
        return self._top_k_per_row(int(k)) if per_row else self._top_k_of_batch(k, hint)

    def blocks(self, rows: int, latents: int) -> Iterator[tuple[int, int, Tensor]]:
        """First row, first latent and product with the encoder of each block, without bias or scale.

        Blocks share one buffer, so a block is valid until the next one. On the way, the extra latents' pre-activations are stored in
        `extra_pre_acts`.
        """
        buffer = self.x.new_empty(rows * latents)
        for top in range(0, self.n_rows, max(rows, 1)):
            x = self.x[top : top + rows]
            for left in range(0, self.n_latents, latents):
                W_enc = self.W_enc[:, left : left + latents]
                block = buffer[: len(x) * W_enc.shape[1]].view(len(x), -1)
                with torch.autocast(self.x.device.type, enabled=False):
                    torch.mm(x, W_enc, out=block)
                self._copy_extra(block, top, left)
                yield top, left, block

    def compute_extra(self) -> None:
        """Compute the pre-activations of the extra latents with one product; for searches that compute no blocks."""
        if len(self.extra_latents):
            torch.addmm(self.b_enc[self.extra_latents], self.x, self.W_enc[:, self.extra_latents], out=self.extra_pre_acts)

    def _copy_extra(self, block: Tensor, top: int, left: int) -> None:
        """Store the pre-activations of the extra latents that a block contains: its products with the encoder, plus the bias."""
        first, last = torch.searchsorted(self.extra_latents, self.extra_latents.new_tensor([left, left + block.shape[1]])).tolist()
        if last > first:
            latents = self.extra_latents[first:last]
            self.extra_pre_acts[top : top + len(block), first:last] = block.index_select(1, latents - left) + self.b_enc[latents]

    def _block_shape(self) -> tuple[int, int]:
        """Rows and latents of a block."""
        block = scaled_size(BLOCK)
        rows = max(min(self.n_rows, BLOCK_ROWS), block // self.n_latents)
        return min(rows, self.n_rows), min(max(block // rows, 1), self.n_latents)

    def _top_k_per_row(self, k: int) -> TopK:
        """The `k` largest positive values of each row; with sharded latents, this rank's part of them."""
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        rows = max(1, min(self.n_rows, scaled_size(ROW_BLOCK_FACTOR * BLOCK) // self.n_latents))
        for top, _, block in self.blocks(rows, self.n_latents):
            raw = block + self.b_enc
            scaled = raw if self.scale is None else raw * self.scale
            columns = scaled.topk(min(k, self.n_latents), sorted=False).indices.sort().values
            values = raw.gather(1, columns)
            is_selected = (values > 0) & topk_mask(scaled.gather(1, columns), k, self.tensor_group)
            row, candidate = is_selected.nonzero(as_tuple=True)
            parts.append((values[row, candidate], row + top, columns[row, candidate]))
        return TopK(*map(torch.cat, zip(*parts, strict=True)), threshold=None) if parts else self._empty()

    def _top_k_of_batch(self, k: float, hint: float | None) -> TopK:
        """The `k * rows` largest positive values of the batch; with several ranks, this rank's part of those of all batches."""
        if self.world.is_single:
            scaled, raw, flat_indices = self.largest(int(k * self.n_rows), hint)
            threshold = scaled.min().item() if len(scaled) else None
        else:
            raw, flat_indices, threshold = self._largest_across_ranks(k, hint)
        rows = flat_indices // self.n_latents
        return TopK(raw, rows, flat_indices - rows * self.n_latents, threshold)

    def _largest_across_ranks(self, k: float, hint: float | None) -> tuple[Tensor, Tensor, float | None]:
        """BatchTopK over all ranks: this rank's selected raw activations, their flat indices, and the threshold of all ranks.

        A rank needs only its own `count` largest activations as candidates, where `count` is the number selected on all ranks together.
        """
        count = int(k * self.world.sum_scalar(self.n_rows, self.b_enc) / self.tensor_group.world_size)
        start = None if hint is None else HINT_FACTOR * hint
        while True:
            if start is None:  # the smallest estimate of all ranks: that of one rank, from its few rows, may be too high for another
                count_here = int(k * self.n_rows / self.tensor_group.world_size)
                estimate = self._estimate_threshold(count_here) if self.n_rows else torch.inf
                start = max(0.0, -self.world.max_scalar(-estimate, self.b_enc))
                hint = None
            empty = self.b_enc.new_empty(0)
            scaled, raw, flat_indices = self._largest_above(start, count) if self.n_rows else (empty, empty, self._empty().rows)
            mask = topk_across_ranks(scaled, count, self.world)
            threshold = mask.threshold.item()
            if start == 0 or (mask.is_complete and threshold >= start):
                order = flat_indices[mask.keep].argsort()
                return raw[mask.keep][order], flat_indices[mask.keep][order], None if threshold == torch.inf else threshold
            start = None if hint is not None else 0.0

    def largest(self, count: int, hint: float | None = None) -> Selection:
        """The `count` largest positive activations of the batch by scaled value, ordered by flat index.

        `hint` is the threshold of a similar batch. The search starts a little below it. The result does not depend on it.
        """
        if count == 0 or self.n_rows == 0:
            self.compute_extra()
            return self.b_enc.new_empty(0), *self._empty()[:2]
        selection = None if hint is None else self._all_largest_above(HINT_FACTOR * hint, count)
        selection = selection or self._all_largest_above(self._estimate_threshold(count), count) or self._largest_above(0.0, count)
        scaled, raw, flat_indices = selection
        flat_indices, order = flat_indices.sort()
        return scaled[order], raw[order], flat_indices

    def _all_largest_above(self, threshold: float, count: int) -> Selection | None:
        """The `count` largest activations, or None if fewer than `count` reach the threshold."""
        selection = self._largest_above(threshold, count)
        return selection if len(selection[0]) == count and selection[0].min() >= threshold else None

    def _largest_above(self, threshold: float, count: int) -> Selection:
        """The `count` largest positive activations above the threshold; all of them if there are fewer.

        Activations slightly below the threshold may be among them, because of the allowance for rounding.
        """
        parts: list[Selection] = []
        n_candidates = 0
        for top, left, block in self.blocks(*self._block_shape()):
            columns = slice(left, left + block.shape[1])
            block_indices = _true_indices(block > self._product_threshold(threshold, columns))
            rows = block_indices // block.shape[1]
            latents = block_indices - rows * block.shape[1] + left
            raw = block.flatten()[block_indices] + self.b_enc[latents]
            scaled = raw if self.scale is None else raw * self.scale[latents]
            parts.append((scaled, raw, (rows + top) * self.n_latents + latents))
            n_candidates += len(raw)
            if n_candidates > MAX_SURPLUS * count:
                parts = [select_largest(parts, count)]
                n_candidates, threshold = count, max(threshold, parts[0][0].min().item())
        return select_largest(parts, count)

    def _product_threshold(self, threshold: float, columns: slice) -> Tensor:
        """Lower bound, per latent, on the product with the encoder of any activation above the threshold.

        It is lower than the exact bound by the rounding errors of the activation and of the sum with the bias.
        """
        threshold *= 1 - SLACK
        bias, epsilon = self.b_enc[columns], torch.finfo(self.b_enc.dtype).eps * 4 if threshold > 0 else 0.0
        return (threshold if self.scale is None else threshold / self.scale[columns]) - bias - epsilon * bias.abs()

    def _estimate_threshold(self, count: int) -> float:
        """An estimate of the threshold of the `count` largest activations, from a few rows."""
        x = self.x[:: max(1, self.n_rows // SAMPLED_ROWS)]
        with torch.autocast(self.x.device.type, enabled=False):
            acts = x @ self.W_enc + self.b_enc
        acts = acts if self.scale is None else acts * self.scale
        return max(0.0, _threshold_estimate(acts.flatten(), count * len(x) / self.n_rows).item())

    def _empty(self) -> TopK:
        indices = torch.empty(0, dtype=torch.long, device=self.x.device)
        return TopK(self.b_enc.new_empty(0), indices, indices, None)


def topk_mask(candidates: Float[Tensor, "row candidate"], count: int, ranks: ProcessGroup) -> Bool[Tensor, "row candidate"]:
    """Which of this rank's candidates are among the `count` largest of their row on all ranks. All ranks have equally many candidates.

    >>> topk_mask(torch.tensor([[1.0, 3.0, 2.0]]), 2, ProcessGroup())
    tensor([[False,  True,  True]])
    """
    all_candidates = ranks.all_gather_columns(candidates)
    if all_candidates.shape[1] <= count:
        return torch.ones_like(candidates, dtype=torch.bool)
    mask = torch.zeros_like(all_candidates, dtype=torch.bool).scatter_(1, all_candidates.topk(count, sorted=False).indices, True)
    return mask[:, ranks.rank * candidates.shape[1] :][:, : candidates.shape[1]]


def select_largest(parts: list[Selection], count: int) -> Selection:
    """The `count` largest positive entries of the concatenated parts by scaled activation; of equal entries the first.

    They are not sorted: they keep the order of the parts.
    """
    scaled, raw, flat_indices = map(torch.cat, zip(*parts, strict=True))
    keep = scaled > 0
    if int(keep.sum()) > count:
        threshold = scaled.kthvalue(len(scaled) - count + 1).values
        keep = scaled > threshold
        keep[(scaled == threshold).nonzero().flatten()[: count - int(keep.sum())]] = True
    return scaled[keep], raw[keep], flat_indices[keep]


def _threshold_estimate(sample: Tensor, expected_count: float) -> Tensor:
    """The sample's value of rank 32 + 1.3 `expected_count`: probably a little below the threshold that `expected_count` values exceed."""
    return sample.topk(min(len(sample), int(1.3 * expected_count) + 32)).values[-1]


def _true_indices(mask: Tensor) -> Tensor:
    """Flat indices of the true entries. On a CPU, eight entries are read as one word first, because most are false."""
    flat = mask.flatten()
    if not is_blocked(mask) or flat.numel() % 8:
        return flat.nonzero().flatten()
    words = flat.view(torch.int64).nonzero().flatten()
    word, byte = flat.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte

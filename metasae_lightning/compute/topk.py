"""Top-k over the pre-activations of a batch, without the full matrix of pre-activations and without ranking all of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.compute.process_group import Parallelism, ProcessGroup
from metasae_lightning.compute.row_chunks import is_blocked, scaled_size
from metasae_lightning.compute.topk_across_ranks import topk_across_ranks

# Of so many values one is looked at to guess where the cut will be; of so many rows some, where there is nothing else to go by.
STRIDE, SAMPLED_ROWS = 31, 32
# Pre-activations that are made at a time: they stay in a processor's cache until they have been looked through. Rows beyond so many
# would only make the blocks narrower, and a product's speed is that of its shorter side.
BLOCK, BLOCK_ROWS = 4 * 2**20, 4096
# On a GPU all of a batch's at the paper's sizes: 4,096 rows of 65,536 latents. A million latents would take more than there is.
GPU_BLOCK = 2**28
# Where each row is ranked, blocks hold whole rows, and short blocks would have the encoder read again and again.
WHOLE_ROWS = 4
# A cut that was right for the batch before is lowered by so much for this one.
NEAR = 0.93
# Candidates beyond so many times what is wanted are thinned out before more come.
SURPLUS = 3
# A cut is compared with this much below its value: a number computed in another order may differ in its last bits.
SLACK = 1e-5


def largest_indices(values: Float[Tensor, " value"], count: int) -> Int[Tensor, " kept"]:
    """Indices of the `count` largest values, in any order; of positive ones alone where fewer are positive. No value is negative.

    A thirty-first of the values guesses a cut somewhat too low, and only what lies above it is ranked. A guess that was too high
    is noticed, and everything is ranked then: the result is that of `topk` in either case, but for the choice among equals.

    >>> sorted(largest_indices(torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0]), 2).tolist()), largest_indices(torch.zeros(3), 2).tolist()
    ([1, 4], [])
    """
    if not is_blocked(values):  # a GPU ranks everything sooner than it could wait for a guess
        return values.topk(count).indices
    above = (values > _guess(values[::STRIDE], count / STRIDE)).nonzero().flatten()
    if len(above) < count:
        above = values.nonzero().flatten()
    return above if len(above) <= count else above[values[above].topk(count, sorted=False).indices]


class TopK(NamedTuple):
    """The top-k latents of a batch, ordered by row, then by latent."""

    values: Float[Tensor, " nnz"]
    """Activations, before any scale."""
    rows: Int[Tensor, " nnz"]
    columns: Int[Tensor, " nnz"]
    threshold: float | None
    """The smallest selected activation, with its scale, over all ranks; None if top-k runs per row or selects nothing."""


class BlockwiseEncoder:
    """Activations `(x W_enc + b_enc) * scale` of a batch, computed and searched in blocks that stay in the processor's cache.

    Args:
        x: The batch.
        W_enc: The encoder.
        b_enc: Its bias, whose type is that of everything but the product.
        scale: Factors that affect the ranking, and not the returned values.
        extra_latents: Latents, sorted, whose pre-activations are returned on every row.
        parallelism: The ranks whose batches share one threshold, and the ranks with other latents of the same rows.
    """

    def __init__(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, extra_latents: Tensor, parallelism: Parallelism
    ) -> None:
        kind = x.device.type
        lower = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else b_enc.dtype
        self.x, self.W_enc, self.b_enc, self.scale, self.extra_latents = x.to(lower), W_enc.to(lower), b_enc, scale, extra_latents
        self.extra_pre_acts = b_enc.new_zeros(len(x), len(extra_latents))
        self.rows, self.latents, self.ranks, self.beside = len(x), W_enc.shape[1], parallelism.world, parallelism.tensor_group

    def keep(self, k: float, *, per_row: bool, hint: float | None) -> TopK:
        """The `k` largest positive values of each row, or the `k * rows` largest positive values of the batch.

        `near` is the edge of a batch like this one. It saves time where it is right, and changes nothing where it is not.
        """
        return self._each_row(int(k)) if per_row else self._whole(k, hint)

    def blocks(self, rows: int, latents: int) -> Iterator[tuple[int, int, Tensor]]:
        """First row, first latent and product with the encoder of each block, without bias or scale. Blocks share one buffer."""
        space = self.x.new_empty(rows * latents)
        for top in range(0, self.rows, max(rows, 1)):
            x = self.x[top : top + rows]
            for left in range(0, self.latents, latents):
                W_enc = self.W_enc[:, left : left + latents]
                block = space[: len(x) * W_enc.shape[1]].view(len(x), -1)
                with torch.autocast(self.x.device.type, enabled=False):
                    torch.mm(x, W_enc, out=block)
                self._copy_extra(block, top, left)
                yield top, left, block

    def compute_extra(self) -> None:
        """Compute the pre-activations of the extra latents with one product; for searches that compute no blocks."""
        if len(self.extra_latents):
            torch.addmm(self.b_enc[self.extra_latents], self.x, self.W_enc[:, self.extra_latents], out=self.extra_pre_acts)

    def _copy_extra(self, block: Tensor, top: int, left: int) -> None:
        first, last = torch.searchsorted(self.extra_latents, self.extra_latents.new_tensor([left, left + block.shape[1]])).tolist()
        if last > first:
            at = self.extra_latents[first:last]
            self.extra_pre_acts[top : top + len(block), first:last] = block.index_select(1, at - left) + self.b_enc[at]

    def _shape(self) -> tuple[int, int]:
        """Rows and latents of a block."""
        block = scaled_size(BLOCK if is_blocked(self.x) else GPU_BLOCK)
        rows = max(min(self.rows, BLOCK_ROWS), block // self.latents)
        return min(rows, self.rows), min(max(block // rows, 1), self.latents)

    def _each_row(self, k: int) -> TopK:
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        rows = max(1, min(self.rows, scaled_size(WHOLE_ROWS * BLOCK if is_blocked(self.x) else GPU_BLOCK) // self.latents))
        for top, _, block in self.blocks(rows, self.latents):
            raw = block + self.b_enc
            scaled = raw if self.scale is None else raw * self.scale
            columns = scaled.topk(min(k, self.latents), sorted=False).indices.sort().values
            values = raw.gather(1, columns)
            at, which = ((values > 0) & topk_mask(scaled.gather(1, columns), k, self.beside)).nonzero(as_tuple=True)
            found.append((values[at, which], at + top, columns[at, which]))
        return TopK(*map(torch.cat, zip(*found, strict=True)), threshold=None) if found else self._nothing()

    def _whole(self, k: float, hint: float | None) -> TopK:
        if self.ranks.is_single:
            scaled, raw, places = self.top(int(k * self.rows), hint)
            edge = scaled.min().item() if len(scaled) else None
        else:
            raw, places, edge = self._of_all(k, hint)
        rows = places // self.latents
        return TopK(raw, rows, places - rows * self.latents, edge)

    def _of_all(self, k: float, hint: float | None) -> tuple[Tensor, Tensor, float | None]:
        """This rank's part of what is kept of all ranks' batches. No more of a rank's own can be kept than are kept of all."""
        count = int(k * self.ranks.sum_scalar(self.rows, self.b_enc) / self.beside.world_size)
        begin = None if hint is None else NEAR * hint
        while True:
            if begin is None:  # one for all: what one rank guessed from its few rows may be too high for another
                own = self._guess(int(k * self.rows / self.beside.world_size)) if self.rows else torch.inf
                begin = max(0.0, -self.ranks.max_scalar(-own, self.b_enc))
                hint = None
            scaled, raw, places = self._above(begin, count) if self.rows else (*[self.b_enc.new_empty(0)] * 2, self._nothing().rows)
            found = topk_across_ranks(scaled, count, self.ranks)
            if begin == 0 or (found.is_complete and found.threshold is not None and found.threshold >= begin):
                order = places[found.keep].argsort()
                return raw[found.keep][order], places[found.keep][order], found.threshold
            begin = None if hint is not None else 0.0

    def top(self, count: int, hint: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled and raw activations and the places of the `count` largest, of positive ones alone, in the order of their places."""
        if count == 0 or self.rows == 0:
            self.compute_extra()
            return self.b_enc.new_empty(0), *self._nothing()[:2]
        found = None if hint is None else self._above_or_not(NEAR * hint, count)
        found = found or self._above_or_not(self._guess(count), count) or self._above(0.0, count)
        scaled, raw, places = found
        places, order = places.sort()
        return scaled[order], raw[order], places

    def _above_or_not(self, cut: float, count: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The same, where that many are above the cut."""
        found = self._above(cut, count)
        return found if len(found[0]) == count and found[0].min() >= cut else None

    def _above(self, cut: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled and raw values and the places of the `count` largest, of all where so few are above the cut."""
        kept: list[tuple[Tensor, Tensor, Tensor]] = []
        held = 0
        for top, left, block in self.blocks(*self._shape()):
            columns = slice(left, left + block.shape[1])
            places = _places(block > self._floor(cut, columns))
            rows = places // block.shape[1]
            latents = places - rows * block.shape[1] + left
            raw = block.flatten()[places] + self.b_enc[latents]
            scaled = raw if self.scale is None else raw * self.scale[latents]
            kept.append((scaled, raw, (rows + top) * self.latents + latents))
            held += len(raw)
            if held > SURPLUS * count:
                kept = [select_largest(kept, count)]
                held, cut = count, max(cut, kept[0][0].min().item())
        return select_largest(kept, count)

    def _floor(self, cut: float, columns: slice) -> Tensor:
        """What a latent's product must exceed for its activation to exceed the cut; lower by what rounding may take from either."""
        cut *= 1 - SLACK
        bias, above = self.b_enc[columns], torch.finfo(self.b_enc.dtype).eps * 4 if cut > 0 else 0.0
        return (cut if self.scale is None else cut / self.scale[columns]) - bias - above * bias.abs()

    def _guess(self, count: int) -> float:
        """A threshold estimated from a few rows."""
        few = self.x[:: max(1, self.rows // SAMPLED_ROWS)]
        with torch.autocast(self.x.device.type, enabled=False):
            acts = few @ self.W_enc + self.b_enc
        acts = acts if self.scale is None else acts * self.scale
        return max(0.0, _guess(acts.flatten(), count * len(few) / self.rows).item())

    def _nothing(self) -> TopK:
        empty = torch.empty(0, dtype=torch.long, device=self.x.device)
        return TopK(self.b_enc.new_empty(0), empty, empty, None)


def topk_mask(candidates: Float[Tensor, "row candidate"], count: int, ranks: ProcessGroup) -> Bool[Tensor, "row candidate"]:
    """Which of a rank's candidates are among the `count` largest of their row on all ranks; as many of each.

    >>> topk_mask(torch.tensor([[1.0, 3.0, 2.0]]), 2, ProcessGroup())
    tensor([[False,  True,  True]])
    """
    of_all = ranks.all_gather_columns(candidates)
    if of_all.shape[1] <= count:
        return torch.ones_like(candidates, dtype=torch.bool)
    kept = torch.zeros_like(of_all, dtype=torch.bool).scatter_(1, of_all.topk(count, sorted=False).indices, True)
    return kept[:, ranks.rank * candidates.shape[1] :][:, : candidates.shape[1]]


def _guess(few: Tensor, wanted: float) -> Tensor:
    """A cut with somewhat more than so many above it."""
    return few.topk(min(len(few), int(1.3 * wanted) + 32)).values[-1]


def _places(mask: Tensor) -> Tensor:
    """Flat indices of what is true: eight at a time first, since most are not."""
    flat = mask.flatten()
    if not is_blocked(mask) or flat.numel() % 8:
        return flat.nonzero().flatten()
    words = flat.view(torch.int64).nonzero().flatten()
    at, offset = flat.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[at] * 8 + offset


def select_largest(found: list[tuple[Tensor, Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest by the first of the three, in order; of equals the first; of positive ones alone."""
    scaled, raw, places = map(torch.cat, zip(*found, strict=True))
    keep = scaled > 0
    if int(keep.sum()) > count:
        edge = scaled.kthvalue(len(scaled) - count + 1).values
        keep = scaled > edge
        keep[(scaled == edge).nonzero().flatten()[: count - int(keep.sum())]] = True
    return scaled[keep], raw[keep], places[keep]

"""Top-k over the pre-activations of a batch on a GPU: one product, one search of it, and, where the search suffices, one
read by the host."""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from metasae_lightning.compute.gpu.host_reads import Then, are_positive, is_deferring, read_numbers
from metasae_lightning.compute.gpu.passes import triton_kernels
from metasae_lightning.compute.gpu.topk import MOST_VALUES, Candidates, CutFactor, Room, exact_largest, exact_largest_of_rows
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_chunks import scaled_size
from metasae_lightning.compute.topk import TopK, topk_mask
from metasae_lightning.compute.topk_across_ranks import topk_across_ranks

# Largest number of pre-activations that are computed at a time: 4 GiB of float32. A smaller batch is computed in one product.
BLOCK = 2**30
# Smallest number that extra latents are padded to.
LEAST_PADDED = 256
# Number of candidates for each selected value: of a search over a batch, and over a row.
BATCH_ROOM, ROW_ROOM = 6, 2


class GpuEncoder:
    """Activations `(x W_enc + b_enc) * scale` of a batch on a GPU. Its results are those of `BlockwiseEncoder`.

    Under autocast the factors of products have the lower precision, and their sums the precision of `b_enc`.

    Args:
        x: The batch.
        W_enc: The encoder.
        b_enc: The encoder's bias. All results have its data type.
        scale: A factor for each latent. It affects the ranking and the threshold, but not the returned values. None is 1.
        extra: Mask of the latents whose pre-activations on every row `top_k` stores in `extra_pre_acts`; None is no latent.
        parallelism: Its `world` are the ranks whose batches share one threshold, its `tensor_group` the ranks with other latents of
            the same rows.
        padded_extra: The number of extra latents of the last batch with their padding. Deferred checks expect the same padding for this
            batch. None pads nothing.
    """

    def __init__(
        self,
        x: Float[Tensor, "row d_in"],
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        scale: Tensor | None,
        extra: Bool[Tensor, " d_sae"] | None,
        parallelism: Parallelism,
        *,
        padded_extra: int | None = None,
    ) -> None:
        device = x.device.type
        product_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else b_enc.dtype
        self.x, self.W_enc, self.b_enc, self.scale = x.to(product_dtype), W_enc.to(product_dtype), b_enc, scale
        self.n_rows, self.n_latents = len(x), W_enc.shape[1]
        self.world, self.tensor_group = parallelism.world, parallelism.tensor_group
        self._extra, self._padded_extra = extra, padded_extra
        # The products of the batch, if it is one block and a search has left them unchanged.
        self._kept: Tensor | None = None
        self._cut_factor = CutFactor()
        self.n_extra: Tensor | None = None
        """Number of extra latents before their padding; None without padding."""
        self.extra_latents = torch.empty(0, dtype=torch.long, device=x.device)
        self.extra_pre_acts = b_enc.new_empty(len(x), 0)

    def top_k(self, k: float, *, per_row: bool, hint: Float[Tensor, ""] | None, cut_factor: CutFactor | None = None) -> TopK:
        """The `k` largest positive values of each row if `per_row`, else the `k * rows` largest positive values of the batch.

        With several ranks the result is this rank's part of the top-k over all of them. `hint` is the threshold of a similar batch; it
        is not used with `per_row`. A good hint saves time; a bad one does not change the result. A search with a hint updates `cut_factor`.
        """
        self._cut_factor = cut_factor or self._cut_factor
        if per_row:
            return self._top_k_per_row(int(k))
        rows = self.n_rows if self.world.is_single else self.world.sum_scalar(self.n_rows, self.b_enc)
        count = int(k * rows / self.tensor_group.world_size)
        if count == 0:
            self._read()
            return self._result_at(self.b_enc.new_empty(0), self.extra_latents[:0], None)
        if not self.world.is_single:
            return self._top_k_across_ranks(count, hint)
        return self._top_k_of_batch(min(count, self.n_rows * self.n_latents), hint)

    def _top_k_of_batch(self, count: int, hint: Tensor | None) -> TopK:
        """The `count` largest positive values of the batch of a single process."""
        room, cut_factor = BATCH_ROOM * count, self._cut_factor
        found = self._candidates(room, hint)
        largest = found.largest(count)
        numbers = [largest.edge, largest.edge - largest.floor]

        def follow(edge: float, above_cut: float, spare: float) -> None:
            cut_factor.update(edge, edge - above_cut, room + 1 - spare, count)

        is_certain = self._are_positive(*numbers, found.spare, then=follow) if isinstance(found, Room) else self._are_positive(*numbers)
        if is_certain:
            return self._result_at(largest.values[0], largest.places[0], largest.edge[0])
        values, places = self._exact_search(count)
        return self._result_at(values, places, values.min() if len(values) else None)

    def _top_k_across_ranks(self, count: int, hint: Tensor | None) -> TopK:
        """This rank's part of the `count` largest positive values of all ranks' batches; the threshold is that of all ranks."""
        found = self._candidates(room := BATCH_ROOM * -(-count // self.world.world_size), hint)
        candidates = found.largest(room) if isinstance(found, Room) else found
        mask = topk_across_ranks(candidates.values[0], count, self.world)
        # The largest floor of any rank: no value that is missing among the candidates exceeds it. It is infinite where a room overflowed.
        floor, of_room = found.floor.clone(), [found.cut, found.n_above] if isinstance(found, Room) else []
        self.world.all_reduce_max_(floor)
        threshold = torch.where(mask.is_complete, mask.threshold, 0.0)
        floor_read, edge, n_kept, *of_room = self._read(floor, threshold, mask.keep.sum(dtype=torch.float64), *of_room)
        if of_room:
            cut, n_above = of_room
            self._cut_factor.update(edge, cut, n_above, room // BATCH_ROOM)
        if floor_read < edge or floor_read <= 0:
            kept = torch.nonzero_static(mask.keep, size=int(n_kept)).flatten()
            return self._result_at(candidates.values[0, kept], candidates.places[0, kept], mask.threshold)
        values, places = self._exact_search(count)
        mask = topk_across_ranks(values, count, self.world)
        return self._result_at(values[mask.keep], places[mask.keep], mask.threshold)

    def _top_k_per_row(self, k: int) -> TopK:
        """The `k` largest positive values of each row; with sharded latents, this rank's part of them."""
        k_here = min(k, self.n_latents)
        found = [Candidates.of_groups(self._activations(rows), ROW_ROOM * k_here).largest(k_here) for rows in self._blocks()]
        columns, values, edges, floors = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        rows = torch.arange(len(values) * k_here, device=values.device) // k_here
        if self.tensor_group.is_single and len(values) and self._are_positive(edges.amin(), (edges - floors).amin()):
            return self._result(values.flatten(), rows, columns.flatten(), None)
        # Latents are divided among ranks, some row has fewer than `k` positive values, or some row's smallest selected value may tie with a
        # value that is not a candidate.
        (margin,) = self._read((edges - floors).masked_fill(edges <= 0, torch.inf).amin()) if len(values) else (1.0,)
        if margin <= 0:
            exact = [exact_largest_of_rows(self._activations(block), k_here) for block in self._blocks()]
            columns, values = map(torch.cat, zip(*exact, strict=True))
        is_selected = (values > 0) & topk_mask(values, k, self.tensor_group)
        selected = is_selected.flatten().nonzero().flatten()
        return self._result(values.flatten()[selected], rows[selected], columns.flatten()[selected], None)

    def _candidates(self, room: int, hint: Tensor | None) -> Room | Candidates:
        """Candidates for the largest values of the batch: those that a kernel finds above a cut, or the `room` largest."""
        has_keys = self.n_rows * self.n_latents < MOST_VALUES and triton_kernels(self.b_enc) is not None
        if hint is not None and has_keys:
            above_cut = Room(room, self._cut_factor.cut(hint))
            for rows in self._blocks():
                products = self._products(rows)
                above_cut.add(products, self.b_enc, self.scale, rows.start)
                self._kept = products if rows.stop >= self.n_rows and not rows.start else None
            return above_cut
        candidates: Candidates | None = None
        for rows in self._blocks():
            part = Candidates.of_groups(self._activations(rows).flatten()[None], room)
            part = part._replace(places=part.places + rows.start * self.n_latents) if rows.start else part
            candidates = part if candidates is None else candidates.merge(part, room)
        assert candidates is not None
        return candidates

    def _exact_search(self, count: int) -> tuple[Tensor, Tensor]:
        """Scaled values and places of the `count` largest positive values of the batch. Its shapes depend on the data."""
        values, places = self.b_enc.new_empty(0), self.extra_latents[:0]
        for rows in self._blocks():
            block_values, block_places = _largest_of_block(self._activations(rows), count)
            values, places = torch.cat([values, block_values]), torch.cat([places, block_places + rows.start * self.n_latents])
            largest = exact_largest(values, count)
            values, places = values[largest], places[largest]
        return values, places

    def _blocks(self) -> Iterator[slice]:
        """The rows of each block; one empty block for a batch without rows."""
        size = max(1, scaled_size(BLOCK) // self.n_latents)
        for top in range(0, max(self.n_rows, 1), size):
            yield slice(top, top + size)

    def _products(self, rows: slice) -> Tensor:
        """The product of some rows with the encoder, without bias or scale."""
        return full_precision_product(self.x[rows], self.W_enc, self.b_enc.dtype)

    def _activations(self, rows: slice) -> Tensor:
        """The activations of some rows, with their scale."""
        products, self._kept = self._products(rows) if self._kept is None else self._kept, None
        pre_acts = products.add_(self.b_enc)
        return pre_acts if self.scale is None else pre_acts.mul_(self.scale)

    def _are_positive(self, *numbers: Tensor, then: Then | None = None) -> bool:
        """Whether all numbers are positive; `then` gets them. Computes the extra latents' pre-activations, unless checks are deferred."""
        if self._extra is None:
            return are_positive(*numbers, then=then)
        if is_deferring():  # two more checks: that the padding is that of the last batch
            n_extra, padded = self._extra.sum(dtype=torch.float64), self._padded_extra or 0
            self._find_extra_latents(n_extra, padded)
            at_most, more_than = padded + 1 - n_extra, n_extra - (padded_size(padded) // 2 if padded > LEAST_PADDED else -1)
            return are_positive(*numbers, at_most, more_than, then=None if then is None else lambda *read: then(*read[: len(numbers)]))
        read = self._read(*numbers)
        if then is not None:
            then(*read)
        return all(number > 0 for number in read)

    def _read(self, *numbers: Tensor) -> list[float]:
        """Read some numbers together with the number of extra latents, then compute these latents' pre-activations."""
        # One number in float64 makes all of them float64, in which counts are exact.
        n_extra = None if self._extra is None else self._extra.sum(dtype=torch.float64)
        parts = [number.view(1) for number in numbers] + ([] if n_extra is None else [n_extra.view(1)])
        if not parts:
            return []
        read = read_numbers(torch.cat(parts) if len(parts) > 1 else parts[0])
        if n_extra is not None:
            count = int(read.pop())
            self._find_extra_latents(n_extra, count if self._padded_extra is None else min(padded_size(count), self.n_latents))
        return read

    def _find_extra_latents(self, n_extra: Tensor, padded: int) -> None:
        """The extra latents, padded to the number `padded`, and their pre-activations."""
        assert self._extra is not None
        if not padded:
            return
        self.extra_latents = torch.nonzero_static(self._extra, size=padded).flatten()
        if self._padded_extra is not None:
            self.n_extra, places = n_extra, torch.arange(padded, device=self.x.device)
            # Any latent will do as padding, because its activations are set to 0. Different ones, so that no row is added to many times.
            self.extra_latents = torch.where(places < n_extra, self.extra_latents, places)
        W_enc = self.W_enc.index_select(1, self.extra_latents)
        self.extra_pre_acts = full_precision_product(self.x, W_enc, self.b_enc.dtype) + self.b_enc[self.extra_latents]

    def _result_at(self, scaled: Tensor, places: Tensor, threshold: Tensor | None) -> TopK:
        """The selected values without their scale; rows and latents follow from the places."""
        return self._result(scaled, places // self.n_latents, places % self.n_latents, threshold)

    def _result(self, scaled: Tensor, rows: Tensor, columns: Tensor, threshold: Tensor | None) -> TopK:
        """The selected values without their scale, with their rows and latents."""
        return TopK(scaled if self.scale is None else scaled / self.scale[columns], rows, columns, threshold)


def padded_size(count: int) -> int:
    """The power of two that a number of extra latents is padded to, so that its changes rarely change a shape.

    >>> [padded_size(count) for count in (0, 1, 5, 300)]
    [0, 256, 256, 512]
    """
    return max(1 << (count - 1).bit_length(), LEAST_PADDED) if count else 0


def _largest_of_block(activations: Float[Tensor, "row latent"], count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest positive activations of a block and their places in it."""
    flat = activations.flatten()
    places = exact_largest(flat, count)
    return flat[places], places


def full_precision_product(x: Float[Tensor, "row d_in"], W: Float[Tensor, "d_in d_sae"], dtype: torch.dtype) -> Float[Tensor, "row d_sae"]:
    """`x W` for factors of one data type, with sums of type `dtype` that are not rounded to that of the factors."""
    with torch.autocast(x.device.type, enabled=False):
        if x.dtype == dtype:
            return x @ W
        if x.device.type == "cuda" and dtype == torch.float32 and hasattr(torch.ops.aten.mm, "dtype"):
            return torch.mm(x, W, out_dtype=dtype)
        return _widened_product(x, W, dtype)


# For a CPU, and for a torch whose product cannot return another data type. One operator: a dry run on a CPU must count neither the
# conversions nor their memory, because a GPU's product needs none.
@torch.library.custom_op("metasae_lightning::widened_product", mutates_args=())
def _widened_product(x: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) @ W.to(dtype)


@_widened_product.register_fake
def _(x: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], W.shape[1], dtype=dtype)

"""Exact top-k on a GPU with shapes that do not depend on the data, so that the host waits once.

A search first ranks candidates and tells whether they certainly contain the largest values. Where they may not, a second search ranks
all values; its shapes depend on the data. Of equal values both searches select the first by place, which is `row * n_latents + latent`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.compute.gpu.passes import triton_kernels

# Number of values for each selected value that should exceed the cut: half of the room.
AIM = 3.0
# The lower half of a key, from which the place is subtracted: of equal values the first has the largest key.
LAST_PLACE = 2**32 - 1
# Batches with fewer values are searched by keys: then their number above a cut fits an int32.
MOST_VALUES = 2**31


class Largest(NamedTuple):
    """The largest values of each group, ordered by place."""

    places: Int[Tensor, "group count"]
    values: Float[Tensor, "group count"]
    edge: Float[Tensor, " group"]
    """The smallest of the values."""
    floor: Float[Tensor, " group"]
    """A number that none of the group's other values exceeds. If it is below `edge`, none of them is among the largest."""


class Candidates(NamedTuple):
    """Values of each group that may be among its largest, ordered by place."""

    places: Int[Tensor, "group candidate"]
    values: Float[Tensor, "group candidate"]
    has_all: bool
    """Whether all values of the group are candidates; otherwise no other value exceeds the smallest candidate."""

    @classmethod
    def of_groups(cls, values: Float[Tensor, "group value"], room: int) -> "Candidates":
        """The `room` largest values of each row."""
        room = min(room, values.shape[1])
        places = values.topk(room, sorted=False).indices.sort().values
        return cls(places, values.gather(1, places), room == values.shape[1])

    def merge(self, later: "Candidates", room: int) -> "Candidates":
        """The `room` largest of these candidates and `later` ones, from another part of each group whose places come after these."""
        places, values = torch.cat([self.places, later.places], 1), torch.cat([self.values, later.values], 1)
        merged = Candidates.of_groups(values, room)
        return Candidates(places.gather(1, merged.places), merged.values, merged.has_all and self.has_all and later.has_all)

    @property
    def floor(self) -> Float[Tensor, " group"]:
        """A number that none of the group's values that are not candidates exceeds."""
        return self.values.new_full(self.values.shape[:1], -torch.inf) if self.has_all else self.values.amin(1)

    def largest(self, count: int) -> Largest:
        """The `count` largest candidates; of equal ones the first.

        >>> largest = Candidates.of_groups(torch.tensor([[1.0, 3.0, 0.0, 3.0, 2.0]]), 4).largest(2)
        >>> largest.places.tolist(), largest.edge.tolist(), largest.floor.tolist()
        ([[1, 3]], [3.0], [1.0])
        """
        ranked, order = self.values.sort(descending=True, stable=True)
        selected = order[:, :count].sort().values
        floor = self.floor if self.has_all else ranked[:, -1]
        return Largest(self.places.gather(1, selected), self.values.gather(1, selected), ranked[:, count - 1], floor)


class CutFactor:
    """The cut that candidates exceed, as a fraction of the last batch's threshold. It adapts to the distribution of the values.

    >>> factor = CutFactor()
    >>> factor.update(edge=1.0, cut=0.9, n_above=90.0, count=10)  # three times fewer are wanted
    >>> 0.93 < factor.value < 0.95
    True
    """

    def __init__(self) -> None:
        self.value = 0.93
        self._on_device: Tensor | None = None

    def store_on_device(self, like: Float[Tensor, ""]) -> None:
        """Keep the value on the device of `like` too, where a CUDA graph reads it."""
        if self._on_device is None or self._on_device.device != like.device:
            self._on_device = like.new_full((), self.value)

    def cut(self, hint: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The cut, from the last batch's threshold."""
        return hint * (self.value if self._on_device is None else self._on_device)

    def update(self, edge: float, cut: float, n_above: float, count: int) -> None:
        """Adapt to a batch in which `n_above` values exceeded `cut` and `count` values reached `edge`.

        The number of values above a cut is assumed to be a power of the cut. On a logarithmic scale, the factor moves halfway to the
        cut that `AIM * count` values would exceed. If too few values exceeded the cut, the factor is squared. It is never below 0.5.
        """
        if n_above <= 1.02 * count or not 0 < cut < edge:
            self.value = max(self.value**2, 0.5)
        else:
            wanted = (cut / edge) ** (math.log(AIM) / math.log(n_above / count))
            self.value = min(max(math.sqrt(self.value * wanted), 0.5), 0.999)
        if self._on_device is not None:
            self._on_device.fill_(self.value)


class Room:
    """The values of a batch above a cut, which a kernel finds in one pass over the pre-activations.

    Args:
        size: Number of values that the room holds; further values are counted and dropped.
        cut: The cut, on the device.
    """

    def __init__(self, size: int, cut: Float[Tensor, ""]) -> None:
        self.cut, self.n_above = cut, torch.zeros(1, dtype=torch.int32, device=cut.device)
        # The key of an empty place in the room is that of the value 0 at place 0. A key of 0 would mean place 2^32 - 1, beyond the batch.
        self.keys = torch.full((size,), LAST_PLACE, dtype=torch.int64, device=cut.device)

    def add(self, products: Float[Tensor, "row latent"], bias: Tensor, scale: Tensor | None, first_row: int) -> None:
        """Add the values `(products + bias) * scale` above the cut; the place of the first product is `first_row * n_latents`."""
        kernels = triton_kernels(products)
        assert kernels is not None
        kernels.compact(products, bias, scale, self.cut, self.keys, self.n_above, first_row)

    @property
    def floor(self) -> Float[Tensor, " group"]:
        """The cut, which no value outside the room exceeds; infinity if values were dropped."""
        return torch.where(self.spare > 0, self.cut, torch.inf)

    @property
    def spare(self) -> Int[Tensor, " 1"]:
        """A number that is positive if no value was dropped: one more than the number of empty places."""
        return len(self.keys) + 1 - self.n_above

    def largest(self, count: int) -> Largest:
        """The `count` largest values in the room, as one group. An empty place in the room is a value of 0 at place 0."""
        top = self.keys.topk(count, sorted=False).values
        places, order = (LAST_PLACE - (top & LAST_PLACE)).sort()
        values = values_of_keys(top[order])
        return Largest(places[None], values[None], values.amin(0, keepdim=True), self.cut[None])


def values_of_keys(keys: Int[Tensor, " value"]) -> Float[Tensor, " value"]:
    """The float32 values of keys: the upper half of a key are the bits of its value.

    >>> values_of_keys(torch.tensor([2.0, 1.5]).view(torch.int32).long() << 32 | LAST_PLACE).tolist()
    [2.0, 1.5]
    """
    return (keys >> 32).int().view(torch.float32)


def exact_largest(values: Float[Tensor, " value"], count: int) -> Int[Tensor, " selected"]:
    """Ascending indices of the `count` largest positive values, fewer where fewer are positive; of equal values the first.

    >>> exact_largest(torch.tensor([1.0, 3.0, 0.0, 1.0, 2.0]), 3).tolist()
    [0, 1, 4]
    """
    if not len(values):
        return torch.empty(0, dtype=torch.long, device=values.device)
    edge = values.topk(min(count, len(values))).values[-1].clamp(min=0)
    above = (values > edge).nonzero().flatten()
    ties = ((values == edge) & (values > 0)).nonzero().flatten()[: max(count - len(above), 0)]
    return torch.cat([above, ties]).sort().values


def exact_largest_of_rows(values: Float[Tensor, "row value"], count: int) -> tuple[Int[Tensor, "row count"], Float[Tensor, "row count"]]:
    """Ascending indices of the `count` largest values of each row, and these values; of equal values the first are taken."""
    indices = values.sort(dim=1, descending=True, stable=True).indices[:, :count].sort().values
    return indices, values.gather(1, indices)

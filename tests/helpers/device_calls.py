"""A counter of the calls that reach a device, and of those among them that the host would wait for on a GPU."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# `item`, `nonzero` and masks as indices; `bincount` and `unique` look for their size.
# `tolist` reaches no operator on a CPU: its calls are counted as they are made.
WAITS = {"tolist", "_local_scalar_dense", "nonzero", "bincount", "_unique2", "unique_consecutive", "masked_select", "equal"}


class DeviceCalls(TorchDispatchMode):
    """Counts the calls of torch's operators in a block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.counts["mask index" if is_mask else name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "DeviceCalls":
        def tolist(tensor: torch.Tensor) -> Any:
            self.counts["tolist"] += 1
            return self._tolist(tensor)

        self._tolist, torch.Tensor.tolist = torch.Tensor.tolist, tolist  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]
        super().__exit__(*error)

    @property
    def total(self) -> int:
        """Number of calls."""
        return sum(self.counts.values())

    @property
    def waits(self) -> dict[str, int]:
        """Number of calls that a GPU makes the host wait for, by name."""
        return {name: count for name, count in self.counts.items() if name in WAITS or name == "mask index"}

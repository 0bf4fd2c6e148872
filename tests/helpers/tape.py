"""A stand-in for a CUDA graph on a CPU: it records torch's calls and makes them again on the same memory, with the same numbers."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# Calls for which the host waits: an error while a CUDA graph is captured.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2"}
# The tapes that record now.
RECORDING: list["Tape"] = []


def storages(values: Any) -> set[int]:
    """Addresses of the memory of all tensors in a nested structure."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class Tape(TorchDispatchMode):
    """Records calls. Unlike a capture it also makes them; `undo` puts back what they changed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []
        self._made: set[int] = set()
        self._before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if func._schema.is_mutable:
            self._keep_what_is_written(func, args, kwargs)
            self.calls.append(lambda: func(*args, **kwargs))
            return func(*args, **kwargs)
        results = func(*args, **kwargs)
        if "empty" not in name and not storages(results) <= storages((args, kwargs)):
            written = [leaf for leaf in tree_leaves(results) if isinstance(leaf, Tensor)]

            def again() -> None:
                for old, new in zip(written, tree_leaves(func(*args, **kwargs)), strict=True):
                    old.copy_(new)

            self.calls.append(again)
        self._made |= storages(results) - storages((args, kwargs))
        return results

    def _keep_what_is_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy what a call overwrites, unless it was made during the recording."""
        arguments = func._schema.arguments
        by_name = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for leaf in tree_leaves(by_name.get(argument.name)):
                    if not storages(leaf) <= self._made:
                        self._before.append((leaf, leaf.detach().clone()))

    def undo(self) -> None:
        """Put back what was there before the first call."""
        for tensor, before in reversed(self._before):
            tensor.detach().copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Make all calls again."""
        for call in self.calls:
            call()


def tape(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step; returns its replay."""
    RECORDING.append(recorded := Tape())
    try:
        with recorded:
            step()
    finally:
        RECORDING.pop()
        recorded.undo()
    return recorded.replay


def as_kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function one call on a tape. It writes to memory that was made during the recording, and may wait, as no kernel does."""

    @wraps(function)
    def kernel(*args: Any) -> None:
        with _disable_current_modes():
            function(*args)
        for recorded in RECORDING:
            recorded.calls.append(lambda: function(*args))

    return kernel

"""The passes of a step over a sparse or a large matrix on a GPU: Triton's kernels where Triton works, else torch's functions."""

import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from metasae_lightning.compute.gpu import torch_forms


def passes_for(tensor: Tensor) -> ModuleType:
    """The module with the passes for a tensor's device and data type: `kernels` or `torch_forms`."""
    return triton_kernels(tensor) or torch_forms


def triton_kernels(tensor: Tensor) -> ModuleType | None:
    """The module with Triton's kernels, which take float32 on a GPU; None for other tensors, and where Triton does not work."""
    takes = tensor.device.type == "cuda" and tensor.dtype == torch.float32
    return _kernels() if takes and _starts_on(tensor.device) else None


@cache
def _kernels() -> ModuleType | None:
    """The module with Triton's kernels; None, with a warning of one line, where Triton is not installed."""
    try:
        from metasae_lightning.compute.gpu import kernels
    except ImportError:
        _warn("triton is not installed")
        return None
    return kernels


@cache
def _starts_on(device: torch.device) -> bool:
    """Whether a kernel starts on a device; a warning of one line where not. Triton needs a C compiler, which not every machine has."""
    if (kernels := _kernels()) is None:
        return False
    try:
        row = torch.ones(1, 1, device=device)
        kernels.unit_rows(row, row)
    except Exception as error:  # a missing compiler, missing headers, a GPU that is too old
        _warn(f"triton starts no kernel on {device} ({' '.join(str(error).split())[:200]})")
        return False
    return True


def _warn(reason: str) -> None:
    warnings.warn(f"{reason}: a step on the GPU uses torch's functions, which are slower", stacklevel=3)

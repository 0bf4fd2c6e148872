"""The passes of a step over a sparse or a large matrix on a GPU: Triton's kernels where Triton is installed, else torch's functions."""

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
    """The module with Triton's kernels, which take float32 on a GPU; None for other tensors, and where Triton is not installed."""
    return _kernels() if tensor.device.type == "cuda" and tensor.dtype == torch.float32 else None


@cache
def _kernels() -> ModuleType | None:
    """The module with Triton's kernels; None, with a warning of one line, where Triton is not installed."""
    try:
        from metasae_lightning.compute.gpu import kernels
    except ImportError:
        warnings.warn("triton is not installed: a step on the GPU uses torch's functions, which are slower", stacklevel=2)
        return None
    return kernels

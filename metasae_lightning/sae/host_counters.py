"""Counters of a module as Python numbers. Reading them never waits for a GPU; checkpoints keep them as tensors."""

from typing import Any

import torch
from torch import Tensor, nn


class HostCounters(nn.Module):
    """Base class of a module whose attributes in `COUNTERS` are integers or bools, stored in its state dict as tensors.

    >>> class Steps(HostCounters):
    ...     COUNTERS = ("steps",)
    ...     steps = 3
    >>> Steps().state_dict()["steps"]
    tensor(3)
    """

    COUNTERS: tuple[str, ...] = ()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.COUNTERS:
            destination[prefix + name] = torch.tensor(getattr(self, name))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        rest = dict(state_dict)
        for name in self.COUNTERS:
            if prefix + name in rest:
                setattr(self, name, rest.pop(prefix + name).item())
            elif strict:
                missing_keys.append(prefix + name)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

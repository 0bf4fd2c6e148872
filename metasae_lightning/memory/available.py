"""The memory that a process may use on a device."""

from pathlib import Path
from typing import Any

import psutil
import torch

# Memory limit of a control group, version 2 and 1: containers and batch systems enforce it; the machine's own figures ignore it.
CONTROL_GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def processes_on_machine(trainer: Any) -> int:
    """Number of processes of the run on this machine."""
    return max(1, getattr(trainer.strategy, "num_processes", 1))


def available_bytes(device: str, processes: int = 1) -> int:
    """The bytes that this process may use on a device.

    On a GPU: its free memory and what this process has reserved. On a CPU: an equal share of the machine's free memory, and what this
    process holds already; at most its share of the control group's limit.
    """
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(torch.device(device))[0] + torch.cuda.memory_reserved(torch.device(device))
    resident = psutil.Process().memory_info().rss
    available = psutil.virtual_memory().available // processes + resident
    for file in (Path(path) for path in CONTROL_GROUP_LIMITS):
        if file.exists() and (limit := file.read_text().strip()).isdigit():
            available = min(available, int(limit) // processes)
    return available

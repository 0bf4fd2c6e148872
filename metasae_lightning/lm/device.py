"""Which device a rank's language model lies on: its SAE's, one that is named, or a GPU of its own."""

from collections.abc import Sequence
from typing import Any

import torch

from metasae_lightning.errors import InputError

AUTO, OWN = "auto", "own"


def gpus() -> int:
    """How many this process sees."""
    return torch.cuda.device_count()


def seat(asked: str, strategy: Any) -> torch.device:
    """Where the language model of this process lies, by what was asked for and where a Lightning strategy has the SAEs of this machine."""
    home: torch.device = strategy.root_device
    if asked in (AUTO, "cuda") and home.type == "cuda":
        return home
    saes: list[torch.device] = list(getattr(strategy, "parallel_devices", None) or [home])
    if asked == OWN:
        taken = [device.index for device in saes if device.type == "cuda"]
        return torch.device("cuda", own(taken, ranks=len(saes), there=gpus())[getattr(strategy, "local_rank", 0)])
    device = found(asked)
    if len(saes) > 1 and device.type == "cuda" and asked not in (AUTO, "cuda"):
        raise InputError(f"device: {asked} would hold a language model of each of {len(saes)} ranks: own gives each a GPU, auto its SAE's")
    return device


def own(taken: Sequence[int], *, ranks: int, there: int) -> list[int]:
    """The GPU of each rank's language model: those that have no SAE, in order.

    >>> own([0, 1, 2, 3], ranks=4, there=8), own([6, 7], ranks=2, there=8)
    ([4, 5, 6, 7], [0, 1])
    """
    free = [number for number in range(there) if number not in taken]
    if len(free) < ranks:
        fewer = f"lower trainer.devices to {there // 2}, or " if taken and there > 1 else ""
        raise InputError(
            f"device: own is a GPU for the language model of each rank beside those of the SAEs, {len(taken) + ranks} on this machine, "
            f"and there is {listed(there)}: {fewer}set language_model.device to auto"
        )
    return free[:ranks]


def found(asked: str) -> torch.device:
    """The device of that name, with its number; without an SAE to lie beside, `own` is any."""
    name = ("cuda" if gpus() else "cpu") if asked in (AUTO, OWN) else asked
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device: {asked!r} is not there: there is {listed(gpus())}") from error
    if (device.index or 0) >= gpus():
        raise InputError(f"device: {asked!r} is not there: there is {listed(gpus())}")
    return device if ":" in str(device) else torch.device("cuda", torch.cuda.current_device())


def listed(there: int) -> str:
    """This machine's devices as people read them.

    >>> listed(0), listed(1), listed(8)
    ('cpu alone', 'cpu and cuda:0', 'cpu and cuda:0 to cuda:7')
    """
    return "cpu alone" if not there else "cpu and cuda:0" + (f" to cuda:{there - 1}" if there > 1 else "")

"""The device of a rank's language model: the GPU of its SAE, a named device, or a GPU without an SAE."""

from collections.abc import Sequence
from typing import Any

import torch

from metasae_lightning.errors import InputError

AUTO, OWN = "auto", "own"


def count_gpus() -> int:
    """The number of CUDA devices that this process can use."""
    return torch.cuda.device_count()


def assign_device(requested: str, strategy: Any) -> torch.device:
    """The device for the language model of this rank.

    Args:
        requested: `auto` for the SAE's GPU, `own` for a GPU without an SAE, or a name such as `cuda:1`. If the SAE is on a CPU, `auto`
            is the current GPU, or the CPU without any GPU. With several ranks, a numbered GPU is an `InputError`.
        strategy: Lightning's strategy, which knows the devices of all SAEs on this machine.
    """
    sae_device: torch.device = strategy.root_device
    if requested in (AUTO, "cuda") and sae_device.type == "cuda":
        return sae_device
    sae_devices: list[torch.device] = list(getattr(strategy, "parallel_devices", None) or [sae_device])
    if requested == OWN:
        used = [device.index for device in sae_devices if device.type == "cuda"]
        gpus = spare_gpus(used, ranks=len(sae_devices), n_gpus=count_gpus())
        return torch.device("cuda", gpus[getattr(strategy, "local_rank", 0)])
    device = parse_device(requested)
    if len(sae_devices) > 1 and device.type == "cuda" and requested not in (AUTO, "cuda"):
        raise InputError(
            f"device: {requested} would hold the language models of all {len(sae_devices)} ranks: "
            "own gives each its own GPU, auto the GPU of its SAE"
        )
    return device


def spare_gpus(used: Sequence[int], *, ranks: int, n_gpus: int) -> list[int]:
    """The GPU number for each rank's language model: the lowest numbers without an SAE. Too few such GPUs are an `InputError`.

    >>> spare_gpus([0, 1, 2, 3], ranks=4, n_gpus=8), spare_gpus([6, 7], ranks=2, n_gpus=8)
    ([4, 5, 6, 7], [0, 1])
    """
    free = [number for number in range(n_gpus) if number not in used]
    if len(free) < ranks:
        fewer_devices = f"lower trainer.devices to {n_gpus // 2}, or " if used and n_gpus > 1 else ""
        raise InputError(
            f"device: own needs a GPU for each rank's language model besides those of the SAEs, {len(used) + ranks} on this machine, "
            f"and there is {describe_devices(n_gpus)}: {fewer_devices}set language_model.device to auto"
        )
    return free[:ranks]


def parse_device(requested: str) -> torch.device:
    """The device of the name `requested`, a GPU always with its number. A device that the machine lacks is an `InputError`.

    No SAE is known here: `auto` and `own` are the current GPU, or the CPU without any GPU.
    """
    name = ("cuda" if count_gpus() else "cpu") if requested in (AUTO, OWN) else requested
    missing = f"device: {requested!r} is not there: there is {describe_devices(count_gpus())}"
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
            return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(missing) from error
    if (device.index or 0) >= count_gpus():
        raise InputError(missing)
    return device if ":" in str(device) else torch.device("cuda", torch.cuda.current_device())


def describe_devices(n_gpus: int) -> str:
    """The devices of a machine, for error messages.

    >>> describe_devices(0), describe_devices(1), describe_devices(8)
    ('cpu alone', 'cpu and cuda:0', 'cpu and cuda:0 to cuda:7')
    """
    return "cpu alone" if not n_gpus else "cpu and cuda:0" + (f" to cuda:{n_gpus - 1}" if n_gpus > 1 else "")

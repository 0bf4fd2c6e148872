"""A model without weights: its SAEs are built on torch's meta device, so that a plan can be made before any weight is allocated."""

from typing import Any

from jsonargparse import Namespace
from torch import nn

from metasae_lightning.errors import InputError
from metasae_lightning.lm.device import parse_device

SAE_ARGUMENTS = ("primary", "meta")
"""Arguments of JointSAE that hold the config of an SAE."""


def weightless_config(config: Any) -> Any:
    """A copy of a model's parsed config whose SAEs have `device: meta`; all arms of a SideBySide are included.

    An SAE's device that the machine lacks is an `InputError`.

    >>> sae = {"class_path": "sae_lens.TopKTrainingSAEConfig", "init_args": {"d_in": 8, "d_sae": 10**12}}
    >>> config = {"class_path": "metasae_lightning.JointSAE", "init_args": {"primary": sae, "meta": None}}
    >>> weightless_config(config)["init_args"]["primary"]["init_args"]["device"], "device" in sae["init_args"]
    ('meta', False)
    """
    if isinstance(config, list):
        return [weightless_config(value) for value in config]
    if not isinstance(config, Namespace | dict):
        return config
    copied = type(config)()
    for key, value in config.items() if isinstance(config, dict) else vars(config).items():
        value = weightless_config(value)
        if key in SAE_ARGUMENTS and isinstance(value, Namespace | dict) and "init_args" in value:
            check_device(key, value["init_args"].get("device"))
            value["init_args"]["device"] = "meta"
        copied[key] = value
    return copied


def check_device(sae: str, device: str | None) -> None:
    """Reject a device, in the config of the SAE `sae`, that the machine lacks."""
    try:
        parse_device(device or "cpu")
    except InputError as error:
        raise InputError(f"{sae}.{error}") from error


def is_weightless(model: nn.Module) -> bool:
    """Whether any parameter of the model is on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


def needs_values(error: Exception) -> bool:
    """Whether an error is torch's about reading values on the meta device.

    >>> needs_values(RuntimeError("Tensor.item() cannot be called on meta tensors")), needs_values(ValueError("k must be positive"))
    (True, False)
    """
    return "meta tensor" in str(error).lower()

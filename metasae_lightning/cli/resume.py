"""Going on from a checkpoint: the file is checked, and the run's settings are compared with those that the checkpoint was written with."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from metasae_lightning import run_folder
from metasae_lightning.cli.entry import rank
from metasae_lightning.errors import InputError
from metasae_lightning.training.checkpoint_files import damage_error, find_damage
from metasae_lightning.training.checkpoint_folder import METADATA, load_plain
from metasae_lightning.training.larger_budget import is_finished, set_rate, used_up_error

CONFIG = "config"
"""Key in a checkpoint: the run's config."""
ARM = r"model\.init_args\.(?:arms\.[^.]+\.init_args\.)?"
CHANGEABLE = re.compile(
    rf"{ARM}(?:penalties\.[^.]+\.init_args\.weight|(?:primary|meta)\.init_args\.(?:\w+_coefficient|device|metadata\b.*)"
    rf"|(?:primary|meta)_optimizer\.init_args\.lr|clip_grad_norm|micro_batches|kernels|non_finite|cuda_graph|(?:meta_)?init_from\b.*)"
    r"|data\.init_args\.(?:tokens|validation_tokens|test_tokens)"
)
"""Settings of the model and the data that may differ from the checkpoint's."""
TOKENS = "data.init_args.tokens"
"""The budget."""
STREAM = "ActivationsDataModule"
"""The data module whose stream compares its own settings with the checkpoint's."""


def check_checkpoint(checkpoint: str) -> None:
    """Reject `best`, and a checkpoint, named by its path, that is missing, damaged or refused. Others are left to Lightning."""
    if checkpoint == "best":  # Lightning knows it only in the process that wrote it
        raise InputError("--ckpt_path best: a run keeps its newest checkpoints, and none as the best: name a file, or last")
    if not is_path(checkpoint):
        return
    if not Path(checkpoint).exists():
        raise InputError(f"--ckpt_path {checkpoint}: there is no such file")
    if damage := find_damage(Path(checkpoint)):
        raise damage_error(Path(checkpoint), damage)


def is_path(checkpoint: str) -> bool:
    """Whether a checkpoint is named by its path, not by one of Lightning's names or an address."""
    return checkpoint not in ("last", "best", "hpc") and "://" not in checkpoint


def check_settings(checkpoint: Path, config: Mapping[str, Any], *, may_grow: bool = False) -> None:
    """Reject settings that shape weights, stream or schedule and are not the checkpoint's; name the others that differ in one line.

    With `may_grow`, a finished run is rejected unless its budget of tokens is larger than it was. A checkpoint without settings, of an
    older version, is compared with the config of its run, and not at all where there is none.
    """
    content = load_plain(checkpoint / METADATA if checkpoint.is_dir() else checkpoint)
    saved = content.get(CONFIG)
    file = run_folder.config_file(checkpoint.resolve().parents[1])
    saved = saved or (run_folder.read_config(file) if file.exists() else None)
    if saved is None or arms(saved) != arms(config):  # other arms have a message of their own when the checkpoint is loaded
        return
    then, now = settings(saved), settings(config)
    changes = differences(then, now)
    fixed = [change for key, change in changes.items() if not may_change(key, config)]
    if fixed:
        more = f" and {len(fixed) - 3} more" if len(fixed) > 3 else ""
        raise InputError(
            f"the checkpoint {checkpoint} goes on with its own settings alone ({'; '.join(fixed[:3])}{more}): weights of penalties, "
            "learning rates, the budget, callbacks and devices may change"
        )
    if may_grow and is_finished(content) and (tokens := then.get(TOKENS)) and now.get(TOKENS, 0) <= tokens:
        raise used_up_error(tokens)
    if changes and not rank():
        sys.stderr.write(f"metasae: goes on with other settings than the checkpoint's: {'; '.join(changes.values())}\n")


def arms(config: Mapping[str, Any]) -> list[str]:
    """The names of a run's arms."""
    return list(((config.get("model") or {}).get("init_args") or {}).get("arms") or ())


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run's model, data, trainer and seed, by their dotted names. A list is one setting.

    >>> settings({"model": {"init_args": {"n_p": 10, "meta": None}}, "run": "runs/a"})
    {'model.init_args.n_p': 10, 'model.init_args.meta': None}
    """
    found: dict[str, Any] = {}
    pending: list[tuple[str, Any]] = [(key, config[key]) for key in ("trainer", "seed_everything", "data", "model") if key in config]
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict) and value:
            pending += [(f"{name}.{key}", child) for key, child in reversed(list(value.items()))]
        else:
            found[name] = value
    return found


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The settings that differ: a text with both values, by name.

    An argument is new in this version, and no difference, if the saved settings lack it and have other arguments of its class.

    >>> differences({"a.init_args.k": 8, "b": None}, {"a.init_args.k": 4, "a.init_args.new": 1, "b.class_path": "B"})
    {'a.init_args.k': 'a.init_args.k: 8 then, 4 now', 'b': 'b: None then', 'b.class_path': 'b.class_path: B now'}
    """
    classes = {name.rpartition(".")[0] for name in then}
    texts: dict[str, str] = {}
    for name in dict.fromkeys([*then, *now]):
        parent = name.rpartition(".")[0]
        is_new = name not in then and parent.endswith("init_args") and parent in classes
        if is_new or (name in then and name in now and then[name] == now[name]):
            continue
        values = [f"{_text(tree[name])} {when}" for tree, when in ((then, "then"), (now, "now")) if name in tree]
        texts[name] = f"{name}: {', '.join(values)}"
    return texts


def may_change(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a setting may differ from the checkpoint's: it shapes neither weights nor stream nor schedule, or the stream checks it."""
    of_stream = name.startswith("data.") and str(config["data"].get("class_path")).endswith(STREAM)
    return bool(CHANGEABLE.fullmatch(name)) or of_stream or name.startswith(("trainer.", "seed_everything"))


def _text(value: Any) -> str:
    """A setting's value, or its type where it is long."""
    return str(value) if len(str(value)) <= 60 else f"a {type(value).__name__} of {len(value)}"


class RunSettings(Callback):
    """Saves the run's config in its checkpoints, and lets its learning rates replace those of the checkpoint that it goes on from.

    Args:
        config: The run's config.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._rates: list[list[float]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the config."""
        checkpoint[CONFIG] = self._config

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the learning rates of the config, before the optimisers' state is restored."""
        self._rates = [[base_rate(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the schedules go on from the config's learning rates where these are not the restored ones."""
        for optimizer, rates in zip(trainer.optimizers, self._rates, strict=True):
            if [base_rate(group) for group in optimizer.param_groups] == rates:
                continue
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                restored = base_rate(group)
                set_rate(group, float(group["lr"]) / restored * rate if restored else rate)
                group |= {"initial_lr": rate} if "initial_lr" in group else {}
            for scheduler in (item.scheduler for item in trainer.lr_scheduler_configs if item.scheduler.optimizer is optimizer):
                for part in (scheduler, *getattr(scheduler, "_schedulers", ())):  # those of a sequence have rates of their own
                    part.base_lrs = list(rates)


def base_rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a parameter group before its schedule."""
    return float(group.get("initial_lr", group["lr"]))

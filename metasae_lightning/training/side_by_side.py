"""Several arms on one stream: each batch is made once and given to every arm, which learns from it as it would alone."""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch, StepOutput
from metasae_lightning.training.arm_callbacks import copy_observers_per_arm
from metasae_lightning.training.joint import JointSAE

# What one SAE's figures begin with: an arm of such a name could not be told from them.
RESERVED_NAMES = {"train", "val", "test", "meta", "penalty", "phi", "throughput", "decoder", "evaluation"}


class SideBySide(LightningModule):
    """Arms that are trained on the same batches, so that what differs between them is what was meant to differ and nothing else.

    An arm is bit for bit what it would be alone: arms share a batch, and neither random numbers nor anything that training moves.
    Callbacks that look at one SAE look at each, through a copy of their own. An arm that has become NaN stops alone.

    Args:
        arms: What to train, by name.
    """

    def __init__(self, arms: dict[str, JointSAE]) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_names(list(arms))
        self._keys = {name: f"arm_{name.replace('.', '_')}" for name in arms}
        self._arms = torch.nn.ModuleDict({self._keys[name]: arm for name, arm in arms.items()})
        self.stopped: dict[str, str] = {}
        self.current_arm: str | None = None
        """Which arm is in its step just now."""

    @property
    def arms(self) -> dict[str, JointSAE]:
        """Every arm by its name."""
        return {name: self._arms[key] for name, key in self._keys.items()}  # pyright: ignore[reportReturnType]

    @property
    def running(self) -> dict[str, JointSAE]:
        """The arms that have not stopped."""
        return {name: arm for name, arm in self.arms.items() if name not in self.stopped}

    @property
    def rows_seen(self) -> int:
        """Tokens trained on, over all ranks."""
        return max(arm.rows_seen for arm in self.arms.values())

    def stop(self, name: str, why: str) -> None:
        """Train an arm no further, and let go of its optimisers' state."""
        if name in self.stopped:
            return
        if list(self.running) == [name]:  # the run ends with it: what was saved before stays what it is
            raise InputError("; ".join(f"{arm}: {reason}" for arm, reason in {**self.stopped, name: why}.items()))
        self.stopped[name] = why
        for optimizer in self.optimizers_by_arm()[name] if self.trainer.optimizers else ():
            optimizer.state.clear()
        rank_zero_warn(f"the arm {name} has stopped, and {', '.join(self.running)} go on: {why}")

    def configure_callbacks(self) -> list[Any]:
        """Have the trainer's callbacks that look at one SAE look at each arm."""
        self.trainer.callbacks[:] = copy_observers_per_arm(self.trainer.callbacks, list(self.arms))  # pyright: ignore
        return []

    def setup(self, stage: str) -> None:
        """Check the data against every arm."""
        for name, arm in self.arms.items():
            arm.trainer = self.trainer
            with errors_name_arm(name):
                arm.setup(stage)

    def configure_model(self) -> None:
        """See JointSAE."""

    def on_fit_start(self) -> None:
        """See JointSAE."""
        for name, arm in self.arms.items():
            with errors_name_arm(name):
                arm.on_fit_start()

    def on_train_start(self) -> None:
        """See JointSAE."""
        for name, arm in self.arms.items():
            with errors_name_arm(name):
                arm.on_train_start()

    def configure_optimizers(self) -> Any:
        """The optimisers and schedules of all arms, one arm's after the other's."""
        made = [arm.configure_optimizers() for arm in self.arms.values()]
        return [optimizer for optimizers, _ in made for optimizer in optimizers], [schedule for _, own in made for schedule in own]

    def optimizers_by_arm(self) -> dict[str, list[Any]]:
        """Each arm's."""
        optimizers: Any = self.optimizers()
        given = iter(optimizers if isinstance(optimizers, list) else [optimizers])
        return {name: [next(given) for _ in range(1 if arm.meta is None else 2)] for name, arm in self.arms.items()}

    def training_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """A step of every arm; callbacks find the StepOutputs by name under `output`."""
        batch, optimizers, outputs = Batch.of(batch), self.optimizers_by_arm(), dict[str, StepOutput]()
        for name, arm in self.running.items():
            self.current_arm = name
            outputs[name] = arm.advance(batch, optimizers[name])
        self.current_arm = None
        self.log_dict(
            prefix_with_arm({name: self.arms[name].scalars(output) for name, output in outputs.items()}), batch_size=batch_size(outputs)
        )
        return {"output": outputs}

    def validation_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """Callbacks find the Evaluations by name under `output`."""
        batch = Batch.of(batch)
        return {"output": {name: arm.evaluate(batch.select_hook(arm.hook)) for name, arm in self.running.items()}}

    test_step = validation_step

    def arm_state_dict(self, state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
        """An arm's part of a checkpoint's weights."""
        start = f"_arms.{self._keys[name]}."
        return {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the arms keep, and which have stopped."""
        checkpoint["stopped_arms"], checkpoint["arms"] = dict(self.stopped), {name: {} for name in self.arms}
        for name, arm in self.arms.items():
            arm.on_save_checkpoint(checkpoint["arms"][name])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the arms that the checkpoint is of."""
        kept = checkpoint.get("arms")
        if kept is None or list(kept) != list(self.arms):
            there = "no arms" if kept is None else f"the arms {', '.join(kept)}"
            raise InputError(f"the checkpoint holds {there}, and this run has {', '.join(self.arms)}: the same in the same order go on")
        self.stopped = dict(checkpoint["stopped_arms"])
        for name, arm in self.arms.items():
            arm.on_load_checkpoint(kept[name])


@contextmanager
def errors_name_arm(name: str) -> Generator[None, None, None]:
    """Say which arm it is that an error is about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"arms.{name}: {error}") from error


def prefix_with_arm(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Every arm's figures under its name.

    >>> prefix_with_arm({"solo": {"train/loss": 1.0}, "joint": {"train/loss": 2.0}})
    {'solo/train/loss': 1.0, 'joint/train/loss': 2.0}
    """
    return {f"{name}/{key}": value for name, own in figures.items() for key, value in own.items()}


def batch_size(outputs: Mapping[str, StepOutput]) -> int:
    """Tokens of the batch that every arm was given."""
    return max(output.codes.shape[0] for output in outputs.values())


def check_names(names: list[str]) -> None:
    """Names of arms are names of folders and of TensorBoard's runs."""
    if not names:
        raise InputError("arms: there is none: name at least one")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name) or name in RESERVED_NAMES:
            said = f"one of {', '.join(sorted(RESERVED_NAMES))}" if name in RESERVED_NAMES else "letters, digits and . _ + = - alone"
            raise InputError(f"arms: a name is a folder's and {'may not be' if name in RESERVED_NAMES else 'has'} {said}, got {name!r}")
        if len(name) > 100:
            raise InputError(f"arms: a name is a folder's and has 100 letters at most, got {len(name)}")
    keys = [name.replace(".", "_").casefold() for name in names]
    for name, key in zip(names, keys, strict=True):
        if keys.count(key) > 1:
            raise InputError(f"arms: {name!r} and another differ in no more than a dot or capitals: rename one")

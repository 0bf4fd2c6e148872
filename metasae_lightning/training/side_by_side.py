"""`SideBySide`: several SAEs (arms) trained on the same batches in one run, each exactly as it would be trained alone."""

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
from metasae_lightning.training import step_memory
from metasae_lightning.training.arm_callbacks import copy_observers_per_arm
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.logging_interval import is_logged

# First parts of log names: an arm with such a name would make them ambiguous.
RESERVED_NAMES = {"train", "val", "test", "meta", "penalty", "phi", "throughput", "decoder", "evaluation"}


class SideBySide(LightningModule):
    """Several arms trained on the same batches: they differ in their arguments and in nothing else.

    An arm is bit-equal to the same JointSAE trained alone: arms share batches, but no random numbers and no training state. Callbacks for
    one SAE are copied for each arm. An arm that has become NaN stops, and the others go on.

    Args:
        arms: The modules to train, by name.
    """

    def __init__(self, arms: dict[str, JointSAE]) -> None:
        super().__init__()
        self.automatic_optimization = False
        check_names(list(arms))
        self._keys = {name: f"arm_{name.replace('.', '_')}" for name in arms}
        self._arms = torch.nn.ModuleDict({self._keys[name]: arm for name, arm in arms.items()})
        self.stopped: dict[str, str] = {}
        self.current_arm: str | None = None
        """Name of the arm that is taking its step, or None between steps."""

    @property
    def arms(self) -> dict[str, JointSAE]:
        """All arms by name."""
        return {name: self._arms[key] for name, key in self._keys.items()}  # pyright: ignore[reportReturnType]

    @property
    def running(self) -> dict[str, JointSAE]:
        """The arms that have not stopped, by name."""
        return {name: arm for name, arm in self.arms.items() if name not in self.stopped}

    @property
    def rows_seen(self) -> int:
        """Tokens that training has read, over all ranks: the largest count of any arm."""
        return max(arm.rows_seen for arm in self.arms.values())

    def stop(self, name: str, why: str) -> None:
        """Stop training an arm and free its optimisers' state. Stopping the last arm is an error, which ends the run."""
        if name in self.stopped:
            return
        if list(self.running) == [name]:  # no checkpoint may replace the good ones
            raise InputError("; ".join(f"{arm}: {reason}" for arm, reason in {**self.stopped, name: why}.items()))
        self.stopped[name] = why
        for optimizer in self.optimizers_by_arm()[name] if self.trainer.optimizers else ():
            optimizer.state.clear()
        rank_zero_warn(f"the arm {name} has stopped, and {', '.join(self.running)} go on: {why}")

    def configure_callbacks(self) -> list[Any]:
        """Replace the trainer's callbacks for one SAE by copies, one for each arm; returns no further callbacks."""
        self.trainer.callbacks[:] = copy_observers_per_arm(self.trainer.callbacks, list(self.arms))  # pyright: ignore
        return []

    def setup(self, stage: str) -> None:
        """Set up every arm."""
        for name, arm in self.arms.items():
            arm.trainer = self.trainer
            with errors_name_arm(name):
                arm.setup(stage)

    def teardown(self, stage: str) -> None:
        """Free the memory that training keeps between steps."""
        step_memory.free(self)

    def configure_model(self) -> None:
        """Do nothing: Lightning's strategies require this hook for sharding, and `setup` has sharded the arms already."""

    def on_fit_start(self) -> None:
        """Load each arm's `init_from` SAEs, so that an error comes before the run begins."""
        for name, arm in self.arms.items():
            with errors_name_arm(name):
                arm.on_fit_start()

    def on_train_start(self) -> None:
        """Load each arm's `init_from` SAEs if `on_fit_start` could not yet, and run its checks before the first step."""
        for name, arm in self.arms.items():
            with errors_name_arm(name):
                arm.on_train_start()

    def configure_optimizers(self) -> Any:
        """The optimisers and schedules of all arms, in the order of the arms."""
        pairs = [arm.configure_optimizers() for arm in self.arms.values()]
        return [item for optimizers, _ in pairs for item in optimizers], [item for _, schedules in pairs for item in schedules]

    def optimizers_by_arm(self) -> dict[str, list[Any]]:
        """The optimisers of each arm: the primary's and, where there is a meta SAE, the meta SAE's."""
        optimizers: Any = self.optimizers()
        remaining = iter(optimizers if isinstance(optimizers, list) else [optimizers])
        return {name: [next(remaining) for _ in range(1 if arm.meta is None else 2)] for name, arm in self.arms.items()}

    def training_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """Take a step of every running arm; callbacks get the StepOutputs, by arm, under the key `output`."""
        batch, optimizers, outputs = Batch.of(batch), self.optimizers_by_arm(), dict[str, StepOutput]()
        for name, arm in self.running.items():
            self.current_arm = name
            outputs[name] = arm.advance(batch, optimizers[name])
        self.current_arm = None
        if is_logged(self.trainer):
            values = {name: self.arms[name].scalars(output) for name, output in outputs.items()}
            self.log_dict(prefix_with_arm(values), batch_size=batch_size(outputs))
        return {"output": outputs}

    def validation_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """Evaluate a batch with every running arm; callbacks get the Evaluations, by arm, under the key `output`."""
        batch = Batch.of(batch)
        return {"output": {name: arm.evaluate(batch.select_hook(arm.hook)) for name, arm in self.running.items()}}

    test_step = validation_step

    def arm_state_dict(self, state_dict: Mapping[str, Any], name: str) -> dict[str, Any]:
        """One arm's weights out of a checkpoint's, under the names that they have in the arm."""
        prefix = f"_arms.{self._keys[name]}."
        return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save each arm's own entries and the arms that have stopped."""
        checkpoint["stopped_arms"], checkpoint["arms"] = dict(self.stopped), {name: {} for name in self.arms}
        for name, arm in self.arms.items():
            arm.on_save_checkpoint(checkpoint["arms"][name])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore each arm's own entries and the arms that had stopped. The checkpoint must have the same arms in the same order."""
        saved = checkpoint.get("arms")
        if saved is None or list(saved) != list(self.arms):
            content = "no arms" if saved is None else f"the arms {', '.join(saved)}"
            raise InputError(f"the checkpoint holds {content}, and this run has {', '.join(self.arms)}: the same in the same order go on")
        self.stopped = dict(checkpoint["stopped_arms"])
        for name, arm in self.arms.items():
            arm.on_load_checkpoint(saved[name])


@contextmanager
def errors_name_arm(name: str) -> Generator[None, None, None]:
    """Begin the message of an InputError with the arm's name, unless the name is empty."""
    try:
        yield
    except InputError as error:
        if not name:
            raise
        raise InputError(f"arms.{name}: {error}") from error


def prefix_with_arm(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the values of all arms into one dictionary, each key with the arm's name before it.

    >>> prefix_with_arm({"solo": {"train/loss": 1.0}, "joint": {"train/loss": 2.0}})
    {'solo/train/loss': 1.0, 'joint/train/loss': 2.0}
    """
    return {f"{name}/{key}": value for name, arm_values in values.items() for key, value in arm_values.items()}


def batch_size(outputs: Mapping[str, StepOutput]) -> int:
    """Number of tokens in the batch, from the arms' outputs."""
    return max(output.codes.shape[0] for output in outputs.values())


def check_names(names: list[str]) -> None:
    """Reject arm names that cannot be folder names or log names, or that collide with another arm's, and an empty list."""
    if not names:
        raise InputError("arms: there is none: name at least one")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name) or name in RESERVED_NAMES:
            demand = f"one of {', '.join(sorted(RESERVED_NAMES))}" if name in RESERVED_NAMES else "letters, digits and . _ + = - alone"
            raise InputError(f"arms: a name is a folder's and {'may not be' if name in RESERVED_NAMES else 'has'} {demand}, got {name!r}")
        if len(name) > 100:
            raise InputError(f"arms: a name is a folder's and has 100 letters at most, got {len(name)}")
    keys = [name.replace(".", "_").casefold() for name in names]
    for name, key in zip(names, keys, strict=True):
        if keys.count(key) > 1:
            raise InputError(f"arms: {name!r} and another differ in no more than a dot or capitals: rename one")

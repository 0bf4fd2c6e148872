"""Stop a run whose loss or parameters are no longer finite, before it overwrites its last good checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from metasae_lightning.compute.row_chunks import is_blocked
from metasae_lightning.errors import InputError
from metasae_lightning.sae.nonfinite import first_nonfinite
from metasae_lightning.step import Batch, StepOutput
from metasae_lightning.training.arm_callbacks import NotFinite, Observer
from metasae_lightning.training.logging_interval import is_logged


class StopOnNaN(Observer):
    """Stop the run with a one-line error where a loss, a penalty or a parameter is NaN or infinite. No checkpoint of that state is written.

    With several arms (`SideBySide`), only the arm with the bad tensor stops. List this callback before the callbacks that write files:
    Lightning calls callbacks in the order of the list.

    Args:
        every: Number of steps between two checks; null checks every step on a CPU, and on a GPU, which each check waits for, the steps that
            are logged. The last step, each checkpoint and each export are always checked.
        skips: Number of steps in a row that an SAE may skip under `non_finite: skip` before the run stops.
    """

    def __init__(self, every: int | None = None, skips: int = 10) -> None:
        for name, value in (("every", every), ("skips", skips)):
            if value is not None and value < 1:
                raise InputError(f"StopOnNaN: {name} must be at least 1, got {value}")
        self.every, self.skips = every, skips

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """At every step: stop after `skips` skipped steps in a row.

        At the steps that `every` names and the last: check the step's losses and penalties, and the parameters as the step left them.
        """
        output: StepOutput = outputs["output"]
        activations = Batch.of(batch).activations
        if output.skipped >= self.skips:  # the count is the same on all ranks
            reason = f"{output.bad_tensor} was not finite in the last of {output.skipped} steps that were left out in a row,"
            self._stop(trainer, pl_module, reason, activations)
        if self._is_due(trainer, activations, batch_idx):
            losses = {} if output.skipped else losses_by_name(output)
            self._check(trainer, pl_module, {**losses, **pl_module.state_dict()}, activations)

    def _is_due(self, trainer: Any, activations: Tensor, batch_idx: int) -> bool:
        """Whether the parameters are checked after this step."""
        if self.every is not None:
            return (batch_idx + 1) % self.every == 0 or trainer.is_last_batch
        return is_blocked(activations) or is_logged(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the parameters here too, because `on_save_checkpoint` is not called for a checkpoint that holds only weights."""
        self._check(trainer, pl_module, pl_module.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the state to be written, while the previous checkpoint still exists."""
        self._check(trainer, pl_module, checkpoint["state_dict"])

    def _check(self, trainer: Trainer, pl_module: Any, named: Mapping[str, Tensor], activations: Tensor | None = None) -> None:
        """Stop on all ranks where a tensor of any rank is not finite."""
        bad_tensor = first_nonfinite(named)
        # If one rank stopped alone, the others would wait for it for ever.
        if trainer.strategy.reduce_boolean_decision(bad_tensor is None, all=True):
            return
        self._stop(trainer, pl_module, f"{bad_tensor or 'a tensor on another rank'} is not finite", activations)

    @staticmethod
    def _stop(trainer: Trainer, pl_module: Any, reason: str, activations: Tensor | None) -> NoReturn:
        """Raise an error that names the tensor, the last good checkpoint and what may help."""
        advice = "a lower learning rate or clip_grad_norm may help"
        if activations is not None and not activations.isfinite().all():
            advice = "the activations of this batch are not finite either: look at the data and the language model's dtype"
        tokens, last = pl_module.rows_seen, last_checkpoint(trainer)
        checkpoint = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
        raise NotFinite(f"{reason} after {tokens:,} tokens; no checkpoint or SAE was written over, {checkpoint}; {advice}")


def losses_by_name(output: StepOutput) -> dict[str, Tensor]:
    """Losses and penalties of a step by readable name. The total comes last, so that the first one that is not finite is a cause."""
    losses = {"the primary's loss": output.primary.loss}
    losses |= {f"penalty {name}": value for name, value in output.penalties.items()}
    losses |= {"the meta SAE's loss": output.meta.loss} if output.meta is not None else {}
    return {**losses, "the loss": output.loss}


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest file of the run's checkpoint callbacks, or else the checkpoint that the run was resumed from; None without either."""
    # The callbacks' own `best_model_path` and `last_model_path` are set before a checkpoint is written.
    folders = [Path(folder) for callback in trainer.checkpoint_callbacks if (folder := getattr(callback, "dirpath", None))]
    written = [path.resolve() for folder in folders for path in folder.glob("*.ckpt") if path.exists()]
    resumed = [Path(trainer.ckpt_path)] if trainer.ckpt_path and Path(trainer.ckpt_path).exists() else []
    return max(written or resumed, key=lambda path: path.stat().st_mtime, default=None)

"""A run that has become NaN ends at once, and what it wrote before stays as it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.sae.nonfinite import first_nonfinite
from metasae_lightning.step import Batch, StepOutput
from metasae_lightning.training.arm_callbacks import NotFinite, Observer


class StopOnNaN(Observer):
    """Stop with one line where a loss, a penalty or a parameter is no longer finite, and let no checkpoint be made of it.

    It stands before the callbacks that write: each is called in turn.

    Args:
        every: Look after so many steps, after the last and before each checkpoint; more than 1 may let a save point of `Export` pass.
        skips: Where such steps are left out (`non_finite: skip`), stop after so many of an SAE's in a row.
    """

    def __init__(self, every: int = 1, skips: int = 10) -> None:
        for name, value in (("every", every), ("skips", skips)):
            if value < 1:
                raise InputError(f"StopOnNaN: {name} must be at least 1, got {value}")
        self.every, self.skips = every, skips

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the step, and at what it left."""
        output: StepOutput = outputs["output"]
        activations = Batch.of(batch).activations
        if output.skipped >= self.skips:  # all ranks have counted the same
            what = f"{output.bad_tensor} was not finite in the last of {output.skipped} steps that were left out in a row,"
            self._stop(trainer, pl_module, what, activations)
        if (batch_idx + 1) % self.every == 0 or trainer.is_last_batch:
            shown = {} if output.skipped else figures(output)
            self._look(trainer, pl_module, {**shown, **pl_module.state_dict()}, activations)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look before a checkpoint of weights alone, which asks nobody."""
        self._look(trainer, pl_module, pl_module.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at what is to be written, while the last checkpoint is still there."""
        self._look(trainer, pl_module, checkpoint["state_dict"])

    def _look(self, trainer: Trainer, pl_module: Any, named: Mapping[str, Tensor], activations: Tensor | None = None) -> None:
        broken = first_nonfinite(named)
        # All ranks stop where one does: the others would wait for it for ever.
        if trainer.strategy.reduce_boolean_decision(broken is None, all=True):
            return
        self._stop(trainer, pl_module, f"{broken or 'a tensor on another rank'} is not finite", activations)

    @staticmethod
    def _stop(trainer: Trainer, pl_module: Any, what: str, activations: Tensor | None) -> NoReturn:
        advice = "a lower learning rate or clip_grad_norm may help"
        if activations is not None and not activations.isfinite().all():
            advice = "the activations of this batch are not finite either: look at the data and the language model's dtype"
        tokens, last = pl_module.rows_seen, last_checkpoint(trainer)
        kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
        raise NotFinite(f"{what} after {tokens:,} tokens; no checkpoint or SAE was written over, {kept}; {advice}")


def figures(output: StepOutput) -> dict[str, Tensor]:
    """What a step came to, by the names that people know, causes before what they lead to."""
    found = {"the primary's loss": output.primary.loss}
    found |= {f"penalty {name}": value for name, value in output.penalties.items()}
    found |= {"the meta SAE's loss": output.meta.loss} if output.meta is not None else {}
    return {**found, "the loss": output.loss}


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest file that the run's checkpoint callbacks have written, or else the one it went on from."""
    # The callbacks' own `best_model_path` and `last_model_path` are set before a checkpoint is written.
    folders = [Path(place) for saver in trainer.checkpoint_callbacks if (place := getattr(saver, "dirpath", None))]
    written = [path.resolve() for folder in folders for path in folder.glob("*.ckpt") if path.exists()]
    resumed = [Path(trainer.ckpt_path)] if trainer.ckpt_path and Path(trainer.ckpt_path).exists() else []
    return max(written or resumed, key=lambda path: path.stat().st_mtime, default=None)

"""Callback that ends a run with NaN or infinite values before anything is written over."""

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
    """Stop with one line when a loss, a penalty or a parameter is not finite, before a checkpoint is made of it.

    List it before the callbacks that write files.

    Args:
        every: Steps between two checks; also checks after the last step and before each checkpoint. More than 1 may miss an export.
        skips: With `non_finite: skip`, stop after this many skipped steps of one SAE in a row.
    """

    def __init__(self, every: int = 1, skips: int = 10) -> None:
        for name, value in (("every", every), ("skips", skips)):
            if value < 1:
                raise InputError(f"StopOnNaN: {name} must be at least 1, got {value}")
        self.every, self.skips = every, skips

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the step's values and the parameters."""
        output: StepOutput = outputs["output"]
        activations = Batch.of(batch).activations
        if output.skipped >= self.skips:  # the count is the same on all ranks
            what = f"{output.bad_tensor} was not finite in the last of {output.skipped} steps that were left out in a row,"
            self._stop(trainer, pl_module, what, activations)
        if (batch_idx + 1) % self.every == 0 or trainer.is_last_batch:
            shown = {} if output.skipped else figures(output)
            self._look(trainer, pl_module, {**shown, **pl_module.state_dict()}, activations)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before a checkpoint of weights alone, for which Lightning calls no hook."""
        self._look(trainer, pl_module, pl_module.state_dict())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint before the last one is replaced."""
        self._look(trainer, pl_module, checkpoint["state_dict"])

    def _look(self, trainer: Trainer, pl_module: Any, named: Mapping[str, Tensor], activations: Tensor | None = None) -> None:
        broken = first_nonfinite(named)
        # All ranks stop together; otherwise the others would wait for ever.
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
    """Values of a step by their logged names, in order of computation."""
    found = {"the primary's loss": output.primary.loss}
    found |= {f"penalty {name}": value for name, value in output.penalties.items()}
    found |= {"the meta SAE's loss": output.meta.loss} if output.meta is not None else {}
    return {**found, "the loss": output.loss}


def last_checkpoint(trainer: Trainer) -> Path | None:
    """The newest checkpoint of the run, or the one that it was resumed from."""
    # Callbacks set `best_model_path` and `last_model_path` before they write the file.
    folders = [Path(place) for saver in trainer.checkpoint_callbacks if (place := getattr(saver, "dirpath", None))]
    written = [path.resolve() for folder in folders for path in folder.glob("*.ckpt") if path.exists()]
    resumed = [Path(trainer.ckpt_path)] if trainer.ckpt_path and Path(trainer.ckpt_path).exists() else []
    return max(written or resumed, key=lambda path: path.stat().st_mtime, default=None)

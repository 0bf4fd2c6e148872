"""The `config.yaml` of a run, and when it is written."""

from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from metasae_lightning.cli.loggers import log_recipe


class SaveConfigOnFirstBatch(SaveConfigCallback):
    """Write the run's `config.yaml` at the first training batch: a run that fails before can be started again under its name."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing at setup, where Lightning's callback writes the file."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the file, if this run has not yet."""
        if self.already_saved:
            return
        # The file describes the run; the checkpoint that it was resumed from is no part of that.
        self.config = self.config.clone()
        self.config["ckpt_path"] = None
        super().setup(trainer, pl_module, "fit")
        log_recipe(trainer.loggers, yaml.safe_load(self.parser.dump(self.config, skip_none=False)))

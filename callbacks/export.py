"""Callback that exports both SAEs as SAELens folders, at the end of training and at intervals."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.sae.export import ExportRecord, export
from metasae_lightning.step import Batch
from metasae_lightning.training.arm_callbacks import Observer


class Export(Observer):
    """Export `saes/primary` and `saes/meta` into the run's folder; both take raw activations.

    The primary is checked, and calibrated if needed, on activations of the last validation.

    Args:
        every_tokens: Tokens between two exports during training; None exports at the end alone.
        calibration_tokens: Held-out tokens to store for the check.
    """

    rows, all_rows = 4096, 131_072
    """Decoder rows for the check of the meta SAE: at a time, and in total (evenly spaced), since its dense latents need memory."""

    def __init__(self, every_tokens: int | None = None, calibration_tokens: int = 131_072) -> None:
        self.every_tokens, self.calibration_tokens = every_tokens, calibration_tokens
        self.records: dict[str, ExportRecord] = {}
        self._samples: list[Tensor] = []
        self._exported_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the interval at the current token count."""
        self._exported_at = pl_module.rows_seen

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the activations of the last validation."""
        self._samples = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Store activations of this validation, up to `calibration_tokens`."""
        if sum(len(x) for x in self._samples) < self.calibration_tokens:
            self._samples.append(outputs["output"].activations.detach().cpu())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Export if one is due."""
        tokens = pl_module.rows_seen
        if self.every_tokens is not None and tokens - self._exported_at >= self.every_tokens:
            self._export(trainer, pl_module, tokens)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Export the trained SAEs."""
        self._export(trainer, pl_module, pl_module.rows_seen)

    def _export(self, trainer: Trainer, pl_module: Any, tokens: int) -> None:
        self._exported_at = tokens
        learners = {role: learner for role in ("primary", "meta") if (learner := getattr(pl_module, role)) is not None}
        weights = {role: learner.weights(keep=trainer.is_global_zero) for role, learner in learners.items()}
        if trainer.is_global_zero:
            self._write_each(trainer, pl_module, tokens, weights)
        # A barrier here, since the next step's messages have shorter timeouts.
        trainer.strategy.barrier()

    def _write_each(self, trainer: Trainer, pl_module: Any, tokens: int, weights: dict[str, dict[str, Tensor]]) -> None:
        hook = getattr(pl_module, "hook", None)
        about = getattr(getattr(trainer, "datamodule", None), "metadata", dict)(*([hook] if hook else []))
        folder = Path(trainer.default_root_dir) / "saes"
        told = {**about, **started(pl_module.primary), "training_tokens": tokens}
        self._write("primary", pl_module.primary, weights["primary"], folder, told, self._samples or self._held_out(trainer, hook))
        if pl_module.meta is not None:
            rows = functional.unit_rows(weights["primary"]["W_dec"])
            model = {key: about[key] for key in ("model_name",) if key in about}
            self._write(
                "meta",
                pl_module.meta,
                weights["meta"],
                folder,
                {**model, **started(pl_module.meta), "reads": "unit decoder rows of ../primary, in the space its normaliser leads to"},
                list(rows[:: -(-len(rows) // self.all_rows)].split(self.rows)),
            )

    def _held_out(self, trainer: Trainer, hook: str | None) -> list[Tensor]:
        """Validation activations, read now if no validation has run yet."""
        data = getattr(trainer, "datamodule", None)
        for batch in data.val_dataloader() if data is not None and is_overridden("val_dataloader", data) else ():
            if sum(len(x) for x in self._samples) >= self.calibration_tokens:
                break
            self._samples.append(Batch.of(batch).select_hook(hook).activations.detach().cpu())
        return self._samples

    def _write(
        self, role: str, learner: Any, weights: dict[str, Tensor], folder: Path, about: dict[str, Any], samples: list[Tensor]
    ) -> None:
        record = export(
            learner.sae,
            folder / role,
            weights=weights,
            normalizer=learner.normalizer,
            updates=int(learner.updates),
            metadata=about,
            samples=[x.to(torch.float32) for x in samples],
        )
        self.records[role] = record
        if record.calibrated:
            rank_zero_info(
                f"{role}: the running threshold missed L0 {record.target_l0:g}; calibrated to {record.l0:.2f} on {record.tokens:,} rows"
            )


def started(learner: Any) -> dict[str, str]:
    """Metadata about the SAE that the weights started from, if any."""
    init_from = learner.config.init_from
    return {} if init_from is None else {"init_from": init_from.place}

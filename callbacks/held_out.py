"""Callback that logs held-out FVU, L0, dead latents and recovered features of the primary SAE."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from metasae_lightning.compute.sharding import full
from metasae_lightning.metrics.dead_latents import DeadLatents
from metasae_lightning.metrics.feature_recovery import FeatureRecovery
from metasae_lightning.metrics.reconstruction import Reconstruction
from metasae_lightning.step import Batch, Evaluation
from metasae_lightning.training.arm_callbacks import Observer


class HeldOut(Observer):
    """Log reconstruction and dead-latent metrics under `val/` or `test/` after each validation or test.

    With data whose true features are known it also logs `mcc` and `uniqueness`, and `f1` if their firings are known.
    """

    def __init__(self) -> None:
        self._reconstruction: Reconstruction | None = None
        self._dead: DeadLatents | None = None
        self._recovery: FeatureRecovery | None = None

    def _begin(self, trainer: Trainer, pl_module: Any) -> None:
        d_sae, d_in = pl_module.primary.W_dec.shape
        self._reconstruction = Reconstruction(d_in).to(pl_module.device)
        self._dead = DeadLatents(d_sae).to(pl_module.device)
        features = getattr(getattr(trainer, "datamodule", None), "features", None)
        if features is not None:
            self._recovery = FeatureRecovery(features).to(pl_module.device)
            self._recovery.update(full(pl_module.primary.W_dec.detach()))

    def _update(self, pl_module: Any, outputs: Any, batch: Any) -> None:
        seen: Evaluation = outputs["output"]
        assert self._reconstruction is not None and self._dead is not None
        self._reconstruction.update(seen.activations, seen.reconstruction, seen.codes)
        self._dead.update(seen.codes)
        if self._recovery is not None:
            self._recovery.update(full(pl_module.primary.W_dec.detach()), seen.codes, Batch.of(batch).features)

    def _log(self, pl_module: Any, prefix: str) -> None:
        assert self._reconstruction is not None and self._dead is not None
        figures = {f"{prefix}/{name}": value for name, value in self._reconstruction.compute().items()}
        figures |= {f"{prefix}/{name}": value for name, value in self._dead.compute().items()}
        if self._recovery is not None:
            found = self._recovery.compute()
            figures |= {f"{prefix}/{name}": found[name] for name in ("mcc", "uniqueness", "f1") if name in found}
        pl_module.log_dict({name: value.float() for name, value in figures.items()})

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the metrics."""
        self._begin(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics."""
        self._update(pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log the metrics."""
        self._log(pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the metrics."""
        self._begin(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics."""
        self._update(pl_module, outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute and log the metrics."""
        self._log(pl_module, "test")

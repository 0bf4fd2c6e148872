"""Held-out FVU, L0, dead latents and recovered features of the primary SAE, logged after each validation and test."""

from typing import Any

from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from metasae_lightning.architectures import Units
from metasae_lightning.compute.sharding import full
from metasae_lightning.metrics.dead_latents import DeadLatents
from metasae_lightning.metrics.feature_recovery import FeatureRecovery
from metasae_lightning.metrics.reconstruction import Reconstruction
from metasae_lightning.step import Batch, Evaluation
from metasae_lightning.training.arm_callbacks import Observer


class HeldOut(Observer):
    """Log measures of the primary SAE on held-out tokens: under `val/` after each validation, under `test/` after each test.

    The measures are those of `metrics.Reconstruction` (such as `val/fvu` and `val/l0`) and `metrics.DeadLatents` (such as `val/dead`).
    Where the data module knows the true features, `val/mcc` and `val/uniqueness` are logged as well, and `val/f1` where it also knows on
    which tokens each feature fires.
    """

    def __init__(self) -> None:
        self._reconstruction: Reconstruction | None = None
        self._dead: DeadLatents | None = None
        self._recovery: FeatureRecovery | None = None

    def _create_metrics(self, trainer: Trainer, pl_module: Any) -> None:
        """Create metrics that hold no batch yet."""
        self._reconstruction = Reconstruction(pl_module.primary.W_dec.shape[1]).to(pl_module.device)
        self._dead = DeadLatents(Units.of(pl_module.primary.sae.cfg).count).to(pl_module.device)
        features = getattr(getattr(trainer, "datamodule", None), "features", None)
        if features is not None:
            self._recovery = FeatureRecovery(features).to(pl_module.device)
            self._recovery.update(_directions(pl_module.primary))

    def _update(self, pl_module: Any, outputs: Any, batch: Any) -> None:
        """Add a held-out batch to each metric."""
        evaluation: Evaluation = outputs["output"]
        assert self._reconstruction is not None and self._dead is not None
        self._reconstruction.update(evaluation.activations, evaluation.reconstruction, evaluation.codes)
        self._dead.update(evaluation.codes)
        if self._recovery is not None:
            self._recovery.update(_directions(pl_module.primary), evaluation.codes, Batch.of(batch).features)

    def _log(self, pl_module: Any, prefix: str) -> None:
        """Compute each metric and log its values as `{prefix}/{name}`."""
        assert self._reconstruction is not None and self._dead is not None
        values = {**self._reconstruction.compute(), **self._dead.compute()}
        if self._recovery is not None:
            recovery = self._recovery.compute()
            values |= {name: recovery[name] for name in ("mcc", "uniqueness", "f1") if name in recovery}
        pl_module.log_dict({f"{prefix}/{name}": value.float() for name, value in values.items()})

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create metrics for this validation or test."""
        self._create_metrics(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Add a batch of a validation or test."""
        self._update(pl_module, outputs, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measures under `val/`."""
        self._log(pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the measures under `test/`."""
        self._log(pl_module, "test")

    # A test begins and takes batches as a validation does; only the prefix of the logged names differs.
    on_test_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_validation_batch_end


def _directions(primary: Any) -> Float[Tensor, "unit d_in"]:
    """The decoder's direction of each unit, from all shards."""
    return Units.of(primary.sae.cfg).directions(full(primary.W_dec.detach()))

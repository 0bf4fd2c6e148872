"""Callback that logs co-firing (phi) of the primary's latents: an estimate in training, exact on test tokens."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from metasae_lightning.metrics.cofiring import Phi, PhiSample
from metasae_lightning.training.arm_callbacks import Observer


class PhiMonitor(Observer):
    """Log `phi/...` of training tokens from random pairs, and `test/phi/...` of all pairs on test tokens.

    Args:
        every_tokens: Training tokens for each estimate; None logs none in training.
        matchings: Random pairings of all latents for the estimate.
        memory_gib: Memory for exact counting, beside the firings.
    """

    def __init__(self, every_tokens: int | None = 100_000, matchings: int = 8, memory_gib: float = 2.0) -> None:
        self.every_tokens, self.matchings, self.memory_gib = every_tokens, matchings, memory_gib
        self._sample: PhiSample | None = None
        self._since = 0
        self._exact: Phi | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the interval at the current token count."""
        self._since = pl_module.rows_seen

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the estimate; log it if due."""
        if self.every_tokens is None:
            return
        codes = outputs["output"].codes
        if self._sample is None:
            self._sample = PhiSample(codes.shape[1], matchings=self.matchings).to(pl_module.device)
        self._sample.update(codes)
        # The module counts the tokens of all ranks, so all ranks compute at the same step.
        if pl_module.rows_seen - self._since >= self.every_tokens:
            pl_module.log_dict({f"phi/{name}": value.float() for name, value in self._sample.compute().items()})
            self._sample.reset()
            self._since = pl_module.rows_seen

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create an empty metric."""
        self._exact = Phi(pl_module.primary.W_dec.shape[0], memory_gib=self.memory_gib, compute_with_cache=False)  # pyright: ignore

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metric."""
        assert self._exact is not None
        self._exact.update(outputs["output"].codes)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count all pairs and log the result."""
        assert self._exact is not None
        rank_zero_info(self._exact.plan())
        pl_module.log_dict({f"test/phi/{name}": value.float() for name, value in self._exact.compute().items()})
        self._exact = None

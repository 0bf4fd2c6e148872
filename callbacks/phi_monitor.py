"""Phi coefficients between the primary SAE's latents: estimated while training, exact on test tokens."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from metasae_lightning.architectures import Units
from metasae_lightning.callbacks.every_tokens import EveryTokens
from metasae_lightning.metrics.cofiring import Phi, PhiSample
from metasae_lightning.training.arm_callbacks import Observer


class PhiMonitor(Observer):
    """Log how strongly the primary SAE's latents fire together, as phi coefficients.

    While training, `phi/...` is estimated from random pairs of latents over the last `every_tokens` training tokens and logged at the end
    of each such window. After a test, `test/phi/...` is counted over all pairs of latents on all test tokens.

    Args:
        every_tokens: Number of training tokens of a window; null makes no estimate while training.
        matchings: Number of random pairings of all latents that the estimate is made from.
        memory_gib: Memory for counting all pairs after a test, in GiB. The stored firings take memory beside it.
    """

    def __init__(self, every_tokens: int | None = 100_000, matchings: int = 8, memory_gib: float = 2.0) -> None:
        self.every_tokens, self.matchings, self.memory_gib = every_tokens, matchings, memory_gib
        self._counter = EveryTokens(every_tokens)
        self._sample: PhiSample | None = None
        self._exact: Phi | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin the first window; a resumed run counts from its number of tokens so far."""
        self._counter.restart(pl_module.rows_seen)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the batch to the window; log `phi/...` and begin the next window where this one is full."""
        if self.every_tokens is None:
            return
        codes = outputs["output"].codes
        if self._sample is None:
            self._sample = PhiSample(codes.shape[1], matchings=self.matchings).to(pl_module.device)
        self._sample.update(codes)
        # `rows_seen` counts the tokens of all ranks, so all ranks compute at the same step.
        if self._counter.is_due(pl_module.rows_seen):
            pl_module.log_dict({f"phi/{name}": value.float() for name, value in self._sample.compute().items()})
            self._sample.reset()
            self._counter.restart(pl_module.rows_seen)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the metric that counts all pairs of latents."""
        self._exact = Phi(Units.of(pl_module.primary.sae.cfg).count, memory_gib=self.memory_gib, compute_with_cache=False)  # pyright: ignore

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Store the batch's firings."""
        assert self._exact is not None
        self._exact.update(outputs["output"].codes)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count all pairs of latents and log `test/phi/...`."""
        assert self._exact is not None
        rank_zero_info(self._exact.plan())
        pl_module.log_dict({f"test/phi/{name}": value.float() for name, value in self._exact.compute().items()})
        self._exact = None

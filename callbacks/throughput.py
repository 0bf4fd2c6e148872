"""Callback that logs speed and memory."""

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log tokens per second since the last log, the memory of the process, and the peak memory of a GPU.

    Args:
        every_tokens: Tokens between two logs, over all ranks.
    """

    def __init__(self, every_tokens: int = 20_000) -> None:
        self.every_tokens = every_tokens
        self._when, self._tokens = 0.0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._when, self._tokens = time.monotonic(), self._done(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log if due."""
        tokens, now = self._done(trainer, pl_module), time.monotonic()
        if tokens - self._tokens < self.every_tokens:
            return
        figures = {"throughput/tokens_per_second": (tokens - self._tokens) / max(now - self._when, 1e-9)}
        figures["throughput/process_gib"] = psutil.Process().memory_info().rss / 2**30
        if pl_module.device.type == "cuda":
            figures["throughput/gpu_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        pl_module.log_dict(figures)
        self._when, self._tokens = now, tokens

    @staticmethod
    def _done(trainer: Trainer, pl_module: Any) -> int:
        return pl_module.rows_seen

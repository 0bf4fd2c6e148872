"""Training speed and memory use, logged at intervals."""

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer

from metasae_lightning.callbacks.every_tokens import EveryTokens


class Throughput(Callback):
    """Log training speed and memory use every `every_tokens` training tokens.

    `throughput/tokens_per_second` is the mean since the last time it was logged, over all ranks. `throughput/process_gib` is the resident
    memory of this process now. `throughput/gpu_gib`, logged only on a GPU, is the peak of allocated GPU memory since the process began.

    Args:
        every_tokens: Number of training tokens between two log entries, over all ranks.
    """

    def __init__(self, every_tokens: int = 20_000) -> None:
        self.every_tokens = every_tokens
        self._counter = EveryTokens(every_tokens)
        self._logged_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock and the token counter; a resumed run counts from its number of tokens so far."""
        self._logged_at = time.monotonic()
        self._counter.restart(pl_module.rows_seen)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log speed and memory where `every_tokens` tokens were trained on since the last time."""
        tokens, now = pl_module.rows_seen, time.monotonic()
        if not self._counter.is_due(tokens):
            return
        values = {"throughput/tokens_per_second": self._counter.elapsed(tokens) / max(now - self._logged_at, 1e-9)}
        values["throughput/process_gib"] = psutil.Process().memory_info().rss / 2**30
        if pl_module.device.type == "cuda":
            values["throughput/gpu_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
        pl_module.log_dict(values)
        self._logged_at = now
        self._counter.restart(tokens)

"""Training speed, where its time goes, and memory use, logged at intervals."""

import time
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, Trainer

from metasae_lightning.callbacks.every_tokens import EveryTokens
from metasae_lightning.data.work_times import StreamTimes, WorkTimes, shares


class Throughput(Callback):
    """Log training speed, where its time goes, and memory use every `every_tokens` training tokens.

    `throughput/tokens_per_second` is the mean since the last time it was logged, over all ranks. `throughput/process_gib` is the resident
    memory of this process now. `throughput/gpu_gib`, logged only on a GPU, is the peak of allocated GPU memory since the process began.

    Four shares of this rank's time add up to one: `throughput/model`, the language model's forward passes; `throughput/sae`, the training
    steps; `throughput/text`, waiting for text; `throughput/host`, everything else, such as Python, other callbacks and validation. A moment
    at which model and SAE both work counts half for each, and as `text` or `host` only if neither works. On a GPU a pass or a step lasts
    from its first to its last kernel there, gaps included; the shares are then logged when the GPU has come to the end of the interval.

    Args:
        every_tokens: Number of training tokens between two log entries, over all ranks.
    """

    def __init__(self, every_tokens: int = 20_000) -> None:
        self.every_tokens = every_tokens
        self._counter = EveryTokens(every_tokens)
        self._logged_at = 0.0
        # The step's times, and those of the stream.
        self._sae, self._stream = WorkTimes(torch.device("cpu")), StreamTimes(torch.device("cpu"))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clocks and the token counter; a resumed run counts from its number of tokens so far."""
        self._logged_at = time.monotonic()
        self._counter.restart(pl_module.rows_seen)
        self._sae = WorkTimes(pl_module.device)
        self._stream = getattr(trainer.train_dataloader, "times", None) or StreamTimes(pl_module.device)
        for times in self._all_times:
            times.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The step begins."""
        self._sae.begin()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step ends. Log speed and memory where `every_tokens` tokens were trained on since the last time."""
        self._sae.end()
        tokens, now = pl_module.rows_seen, time.monotonic()
        if self._counter.is_due(tokens):
            values = {"throughput/tokens_per_second": self._counter.elapsed(tokens) / max(now - self._logged_at, 1e-9)}
            values["throughput/process_gib"] = psutil.Process().memory_info().rss / 2**30
            if pl_module.device.type == "cuda":
                values["throughput/gpu_gib"] = torch.cuda.max_memory_allocated(pl_module.device) / 2**30
            pl_module.log_dict(values)
            self._logged_at = now
            self._counter.restart(tokens)
            self._end_window()
        if all(times.is_complete() for times in self._all_times):
            pl_module.log_dict(self._read_shares())

    @property
    def _all_times(self) -> tuple[WorkTimes, ...]:
        """The times of the step, the language model and the text. Each has an event of its own for the end of an interval."""
        return self._sae, self._stream.model, self._stream.text

    def _end_window(self) -> None:
        """End the interval whose shares are logged next, unless the GPU has not come to the end of the last one."""
        if not self._sae.has_ended:
            for times in self._all_times:
                times.end_window()

    def _read_shares(self) -> dict[str, float]:
        """The shares of the interval that has ended, by their names in the logs."""
        sae, seconds = self._sae.spans()
        values = shares(seconds, sae=sae, model=self._stream.model.spans()[0], text=self._stream.text.spans()[0])
        return {f"throughput/{name}": value for name, value in values.items()}

"""End a run of several ranks when one of them no longer responds, and name that rank."""

import os
import sys
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed as dist

from metasae_lightning.errors import InputError


class Watchdog(Callback):
    """End a run of several ranks that has made no progress for `minutes`, and name the rank that the others wait for.

    A rank that waits inside a collective operation runs no Python code on its main thread. So each rank has two more threads: one
    exchanges progress counts with the other ranks through torch's store, and one checks the counts and their age. A run on one rank has
    no watchdog.

    Args:
        minutes: Longest time that a step, a batch of a validation or a checkpoint may take, in minutes.
    """

    def __init__(self, minutes: float = 15.0) -> None:
        if minutes <= 0:
            raise InputError(f"Watchdog: minutes must be more than 0, got {minutes}")
        self.minutes = minutes
        self._progress = 0
        self._finished = threading.Event()
        self._reports: dict[int, tuple[str, float]] = {}
        self._exchanged_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where there are several ranks: start the thread that exchanges progress and the thread that checks it."""
        if trainer.world_size > 1 and dist.is_initialized():
            self._finished.clear()
            # torch has no public name for the store that its process group was set up with.
            store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store())  # pyright: ignore
            self._exchanged_at = time.monotonic()
            self._reports = dict.fromkeys(range(trainer.world_size), ("0/", self._exchanged_at))
            arguments = (store, trainer.global_rank, trainer.world_size)
            threading.Thread(target=self._exchange_progress, args=arguments, name="watch: messages", daemon=True).start()
            threading.Thread(target=self._check_progress, name="watch", daemon=True).start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a training step as progress."""
        self._progress += 1

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count a validation batch as progress."""
        self._progress += 1

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count the start of a checkpoint as progress: the work before it is done."""
        self._progress += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop both threads: after training, rank zero may work alone for long."""
        self._finished.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the two watch threads, because this exception ends the run."""
        self._finished.set()

    def _exchange_progress(self, store: Any, rank: int, world_size: int) -> None:
        """Publish this rank's progress in the store and read the progress of all ranks, in a loop until training ends.

        Rank 0 holds the store. Once rank 0 has ended, calls to the store wait, or raise a RuntimeError, which ends the loop.
        """
        while not self._finished.is_set():
            try:
                store.set(str(rank), f"{self._progress}/{time.monotonic()}")
                reports = {other: store.get(str(other)).decode() for other in range(world_size) if store.check([str(other)])}
            except RuntimeError:
                return
            now = time.monotonic()
            for other, report in reports.items():
                if self._reports[other][0] != report:
                    self._reports[other] = (report, now)
            self._exchanged_at = now
            self._finished.wait(60 * self.minutes / 20)

    def _check_progress(self) -> None:
        """End the run where this rank has made no progress for `minutes`."""
        limit, progress, since = 60 * self.minutes, -1, time.monotonic()
        checked_at = since
        while not self._finished.wait(limit / 20):
            now = time.monotonic()
            # A long time since the last check means that this whole process was suspended, which is no rank's fault.
            if self._progress != progress or now - checked_at > limit / 4:
                progress, since = self._progress, now
            checked_at = now
            if now - since > limit:
                if now - self._exchanged_at > limit / 4:
                    self._end(
                        f"rank 0, which keeps what ranks tell each other, was last heard of {now - self._exchanged_at:,.0f} s ago", limit
                    )
                ranks = {other: (int(report.split("/")[0]), now - at) for other, (report, at) in self._reports.items()}
                self._end(describe_missing_rank(ranks, limit), limit)

    def _end(self, reason: str, limit: float) -> None:
        """Write a one-line error and end the process with status 3; the main thread may be in a collective that never returns."""
        message = f"no step was made for {limit:,.0f} s, and this run ends: {reason}"
        sys.stderr.write(f"metasae: error: {message}; --ckpt_path last goes on from the last checkpoint\n")
        sys.stderr.flush()
        os._exit(3)


def describe_missing_rank(ranks: dict[int, tuple[int, float]], limit: float) -> str:
    """Which ranks the others wait for, from each rank's progress count and the seconds since its last report.

    They are the ranks whose last report is older than `limit / 4` seconds, or else the ranks with a smaller count than others.

    >>> describe_missing_rank({0: (7, 0.5), 1: (7, 40.0)}, 30.0)
    'rank 1 was last heard of 40 s ago'
    >>> describe_missing_rank({0: (7, 0.5), 1: (6, 0.7)}, 30.0)
    'rank 1 has made 6 steps and others 7'
    """
    silent = {rank: seconds for rank, (_, seconds) in ranks.items() if seconds > limit / 4}
    if silent:
        return ", ".join(f"rank {rank} was last heard of {seconds:,.0f} s ago" for rank, seconds in silent.items())
    steps = [count for count, _ in ranks.values()]
    behind = [str(rank) for rank, (count, _) in ranks.items() if count < max(steps)]
    if not behind:
        return f"all ranks stand at step {max(steps)}"
    return f"rank {', '.join(behind)} has made {min(steps)} steps and others {max(steps)}"

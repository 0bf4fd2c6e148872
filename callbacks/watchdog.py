"""Callback that ends a run of several ranks when one stops responding, and names it."""

import os
import sys
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed as dist

from metasae_lightning.errors import InputError


class Watchdog(Callback):
    """End a run of several ranks that makes no step for `minutes`, and name the rank that it waits for.

    Ranks wait for each other inside collective operations, where Python cannot act. So each rank has a thread that reports its progress,
    and one that checks the progress of the others.

    Args:
        minutes: Longest time for a step, a validation or a checkpoint.
    """

    def __init__(self, minutes: float = 15.0) -> None:
        if minutes <= 0:
            raise InputError(f"Watchdog: minutes must be more than 0, got {minutes}")
        self.minutes = minutes
        self._moves = 0
        self._over = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        self._answered = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the threads."""
        if trainer.world_size > 1 and dist.is_initialized():
            self._over.clear()
            # torch has no public name for the rendezvous store.
            store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store())  # pyright: ignore
            self._answered = time.monotonic()
            self._heard = dict.fromkeys(range(trainer.world_size), ("0/", self._answered))
            talk = (store, trainer.global_rank, trainer.world_size)
            threading.Thread(target=self._talk, args=talk, name="watch: messages", daemon=True).start()
            threading.Thread(target=self._look, name="watch", daemon=True).start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Record a step."""
        self._moves += 1

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Record a validation step."""
        self._moves += 1

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record progress: a checkpoint is about to be written."""
        self._moves += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the threads; what follows runs on rank 0 alone."""
        self._over.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the threads."""
        self._over.set()

    def _talk(self, store: Any, rank: int, world_size: int) -> None:
        """Report progress and read that of others. Rank 0 hosts the store: without it this waits or fails."""
        while not self._over.is_set():
            try:
                store.set(str(rank), f"{self._moves}/{time.monotonic()}")
                said = {other: store.get(str(other)).decode() for other in range(world_size) if store.check([str(other)])}
            except RuntimeError:
                return
            now = time.monotonic()
            for other, words in said.items():
                if self._heard[other][0] != words:
                    self._heard[other] = (words, now)
            self._answered = now
            self._over.wait(60 * self.minutes / 20)

    def _look(self) -> None:
        """End the run if no step was made in time."""
        limit, moved, since = 60 * self.minutes, -1, time.monotonic()
        looked = since
        while not self._over.wait(limit / 20):
            now = time.monotonic()
            if self._moves != moved or now - looked > limit / 4:  # this process itself was suspended
                moved, since = self._moves, now
            looked = now
            if now - since > limit:
                if now - self._answered > limit / 4:
                    self._end(f"rank 0, which keeps what ranks tell each other, was last heard of {now - self._answered:,.0f} s ago", limit)
                heard = {other: (int(words.split("/")[0]), now - at) for other, (words, at) in self._heard.items()}
                self._end(waited_for(heard, limit), limit)

    def _end(self, who: str, limit: float) -> None:
        ends = f"no step was made for {limit:,.0f} s, and this run ends: {who}"
        sys.stderr.write(f"metasae: error: {ends}; --ckpt_path last goes on from the last checkpoint\n")
        sys.stderr.flush()
        os._exit(3)


def waited_for(ranks: dict[int, tuple[int, float]], limit: float) -> str:
    """Name the rank that others wait for, from each rank's steps and the seconds since its last report.

    >>> waited_for({0: (7, 0.5), 1: (7, 40.0)}, 30.0)
    'rank 1 was last heard of 40 s ago'
    >>> waited_for({0: (7, 0.5), 1: (6, 0.7)}, 30.0)
    'rank 1 has made 6 steps and others 7'
    """
    silent = {rank: quiet for rank, (_, quiet) in ranks.items() if quiet > limit / 4}
    if silent:
        return ", ".join(f"rank {rank} was last heard of {quiet:,.0f} s ago" for rank, quiet in silent.items())
    steps = [made for made, _ in ranks.values()]
    behind = [str(rank) for rank, (made, _) in ranks.items() if made < max(steps)]
    if not behind:
        return f"all ranks stand at step {max(steps)}"
    return f"rank {', '.join(behind)} has made {min(steps)} steps and others {max(steps)}"

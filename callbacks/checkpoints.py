"""Checkpoints at intervals and when a run is told to stop, between two steps and never inside one."""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.errors import InputError
from metasae_lightning.training.checkpoint_files import link_and_prune

# What a run may be told, the most pressing last: each is heeded by all ranks where one has heard it.
TOLD = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT] if hasattr(signal, "SIGUSR1") else [signal.SIGTERM, signal.SIGINT]


class Checkpoints(Checkpoint):
    """Everything that a run needs to go on, in `checkpoints/`: at intervals, at the end, and when it is told to stop.

    SIGTERM, Ctrl-C and a batch system's warning (SIGUSR1, where Lightning heeds it) wait for the end of the step, or of a validation and
    the step after it, where all ranks write one checkpoint and end together. After the last step the run ends as it would have. A second
    Ctrl-C ends it at once. Where a validation follows a step, what is due then is done after it: a run that went on from before it would
    go on without it.

    Args:
        every_tokens: After so many more tokens.
        every_minutes: After so many minutes.
        keep: How many are kept.
    """

    def __init__(self, every_tokens: int | None = None, every_minutes: float | None = 10.0, keep: int = 2) -> None:
        for name, value in (("every_tokens", every_tokens), ("every_minutes", every_minutes), ("keep", keep)):
            if value is not None and value <= 0:
                raise InputError(f"Checkpoints: {name} must be more than 0, got {value}")
        self.every_tokens, self.every_minutes, self.keep = every_tokens, every_minutes, keep
        self.dirpath: Path | None = None
        self._saved_at, self._when = 0, 0.0
        self._told = self._after_validation = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count from where the run stands, and listen."""
        self.dirpath = Path(trainer.default_root_dir) / "checkpoints"
        self._saved_at, self._when, self._told, self._after_validation = pl_module.rows_seen, time.monotonic(), 0, 0
        if threading.current_thread() is threading.main_thread():
            for number in TOLD:
                if signal.getsignal(number) not in (None, signal.SIG_DFL, signal.SIG_IGN):  # only what somebody heeds
                    self._handlers[number] = signal.signal(number, self._hear)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save where it is due, and then do what the run was told."""
        tokens = pl_module.rows_seen
        due = self.every_tokens is not None and tokens - self._saved_at >= self.every_tokens
        due |= self.every_minutes is not None and time.monotonic() - self._when >= 60 * self.every_minutes
        # Clocks differ, and a signal reaches ranks one by one: they decide together.
        told = int(ProcessGroup.default().max_scalar(2 * self._told + due, next(pl_module.parameters())))
        # Of a run that is at its end the checkpoint is that of the end, once everything else is written.
        if told and not trainer.is_last_batch:
            if validates(trainer):
                self._after_validation = told
            else:
                self._do(trainer, tokens, told)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Do what has waited."""
        told, self._after_validation = self._after_validation, 0
        if told:
            self._do(trainer, pl_module.rows_seen, told)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The trained run; until it is there, an earlier one is gone on with."""
        self._save(trainer, pl_module.rows_seen)
        self._listen_no_more()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Signals are Lightning's again."""
        self._listen_no_more()

    def _do(self, trainer: Trainer, tokens: int, told: int) -> None:
        self._save(trainer, tokens)
        if told > 1:
            self._heed(trainer, TOLD[told // 2 - 1])

    def _save(self, trainer: Trainer, tokens: int) -> None:
        assert self.dirpath is not None
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._saved_at, self._when = tokens, time.monotonic()
        path = self.dirpath / f"tokens={tokens}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            link_and_prune(path, self.keep)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._told == TOLD.index(signal.SIGINT) + 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT:  # whatever was being written when it came is not written into
            os.write(2, b"\nmetasae: stopping after the next step, with a checkpoint; Ctrl-C again stops at once\n")
        self._told = max(self._told, TOLD.index(signal.Signals(number)) + 1)

    def _heed(self, trainer: Any, number: signal.Signals) -> None:
        rank_zero_info(f"{number.name}: a checkpoint is written, {self.dirpath}; --ckpt_path last goes on from it")
        self._told = 0
        if number == signal.SIGINT:
            self._listen_no_more()
            raise KeyboardInterrupt
        if number == signal.SIGTERM:  # Lightning ends the loop by it, on every rank
            self._listen_no_more()
            trainer._signal_connector.received_sigterm = True
        elif handler := self._handlers.get(number):  # the batch system starts the run again, and ends this one by itself
            handler(number, None)

    def _listen_no_more(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def validates(trainer: Any) -> bool:
    """Whether a validation follows the step that was just made, which Lightning asks itself alone."""
    loop = trainer.fit_loop
    return any(trainer.num_val_batches) and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

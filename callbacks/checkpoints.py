"""Callback that writes checkpoints at intervals and when the run is told to stop, always between two steps."""

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

# Signals, the most urgent last; all ranks act if one rank has received it.
TOLD = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT] if hasattr(signal, "SIGUSR1") else [signal.SIGTERM, signal.SIGINT]


class Checkpoints(Checkpoint):
    """Write checkpoints into `checkpoints/`: at intervals, at the end, and when the run is told to stop.

    SIGTERM, Ctrl-C and a batch system's warning (SIGUSR1, if Lightning handles it) wait for the end of the step, or of a validation and
    the step after it. Then all ranks write one checkpoint and end together. A signal after the last step changes nothing. A second Ctrl-C
    ends the run at once. If a validation follows a step, a due checkpoint is written after the validation, because a run that continued
    from before it would skip it.

    Args:
        every_tokens: Tokens between two checkpoints.
        every_minutes: Minutes between two checkpoints.
        keep: Number of newest checkpoints to keep.
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
        """Start the intervals at the current token count, and install signal handlers."""
        self.dirpath = Path(trainer.default_root_dir) / "checkpoints"
        self._saved_at, self._when, self._told, self._after_validation = pl_module.rows_seen, time.monotonic(), 0, 0
        if threading.current_thread() is threading.main_thread():
            for number in TOLD:
                if signal.getsignal(number) not in (None, signal.SIG_DFL, signal.SIG_IGN):  # only if Lightning handles it
                    self._handlers[number] = signal.signal(number, self._hear)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a checkpoint if one is due, then act on a signal."""
        tokens = pl_module.rows_seen
        due = self.every_tokens is not None and tokens - self._saved_at >= self.every_tokens
        due |= self.every_minutes is not None and time.monotonic() - self._when >= 60 * self.every_minutes
        # Clocks differ and a signal reaches ranks at different times, so ranks decide together.
        told = int(ProcessGroup.default().max_scalar(2 * self._told + due, next(pl_module.parameters())))
        # At the end of the run the final checkpoint is written instead, in on_train_end.
        if told and not trainer.is_last_batch:
            if validates(trainer):
                self._after_validation = told
            else:
                self._do(trainer, tokens, told)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the checkpoint that waited for the validation."""
        told, self._after_validation = self._after_validation, 0
        if told:
            self._do(trainer, pl_module.rows_seen, told)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the final checkpoint, after everything else was written."""
        self._save(trainer, pl_module.rows_seen)
        self._listen_no_more()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous signal handlers."""
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
        if number == signal.SIGINT:  # start a new line on the terminal
            os.write(2, b"\nmetasae: stopping after the next step, with a checkpoint; Ctrl-C again stops at once\n")
        self._told = max(self._told, TOLD.index(signal.Signals(number)) + 1)

    def _heed(self, trainer: Any, number: signal.Signals) -> None:
        rank_zero_info(f"{number.name}: a checkpoint is written, {self.dirpath}; --ckpt_path last goes on from it")
        self._told = 0
        if number == signal.SIGINT:
            self._listen_no_more()
            raise KeyboardInterrupt
        if number == signal.SIGTERM:  # Lightning ends its loop on every rank
            self._listen_no_more()
            trainer._signal_connector.received_sigterm = True
        elif handler := self._handlers.get(number):  # the batch system requeues the run and ends this process
            handler(number, None)

    def _listen_no_more(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}


def validates(trainer: Any) -> bool:
    """Whether Lightning runs a validation after the current step."""
    loop = trainer.fit_loop
    return any(trainer.num_val_batches) and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

"""Checkpoints at intervals and when the process receives a signal, always between two training steps."""

import os
import signal
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from metasae_lightning.callbacks.every_tokens import EveryTokens
from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.errors import InputError
from metasae_lightning.training.checkpoint_files import link_and_prune

# Signals that ask for a checkpoint, the most urgent last. The ranks agree on the most urgent one that any of them has received.
SIGNALS = [getattr(signal, name) for name in ("SIGUSR1", "SIGHUP", "SIGTERM", "SIGINT") if hasattr(signal, name)]
# The first checkpoints of a run: at this share of its batches, though not before so many seconds, and after a minute.
EARLY_SHARE, EARLIEST_SECONDS, EARLY_SECONDS = 0.01, 10.0, 60.0


class Checkpoints(Checkpoint):
    """Write checkpoints, from which a run can be resumed, into `checkpoints/`: at intervals, at the end of training, and on a signal.

    The signals are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal or the ssh session has ended) and SIGUSR1, a batch system's warning.
    SIGHUP is caught unless it is ignored, as under `nohup`; each other is caught only where Lightning or Python handles it. After a signal
    the current step is finished, and all ranks write one checkpoint together. Then SIGTERM, SIGINT and SIGHUP end the run, and the
    process exits with 128 and the signal's number. After SIGUSR1 Lightning asks the batch system to start the run again, and the batch
    system ends this process. A signal during a validation waits until the first step after it. A second Ctrl-C ends the run at once. A
    signal during the last step changes nothing: the run ends as usual.

    Where a validation follows a step, the checkpoint of that step is written after the validation. A run that is resumed from it then
    does not skip the validation.

    Where an interval is set, two more checkpoints are written soon after the start: at 1 % of the batches, not before ten seconds, and
    after a minute.

    Args:
        every_tokens: Number of training tokens between two checkpoints, over all ranks; null sets no interval in tokens.
        every_minutes: Minutes between two checkpoints; null sets no interval in time.
        keep: Number of checkpoints that stay on disk; older ones are deleted.
    """

    def __init__(self, every_tokens: int | None = None, every_minutes: float | None = 10.0, keep: int = 2) -> None:
        for name, value in (("every_tokens", every_tokens), ("every_minutes", every_minutes), ("keep", keep)):
            if value is not None and value <= 0:
                raise InputError(f"Checkpoints: {name} must be more than 0, got {value}")
        self.every_tokens, self.every_minutes, self.keep = every_tokens, every_minutes, keep
        self.dirpath: Path | None = None
        self._counter, self._started_at, self._saved_at = EveryTokens(every_tokens), 0.0, 0.0
        # Batches since the start of training, and how many of the two checkpoints after the start were due.
        self._batches, self._early = 0, 0
        # A signal is stored as its index in SIGNALS plus one; 0 is none.
        self._received = 0
        # What `_request` returned at a step that a validation follows: the checkpoint is written after the validation.
        self._postponed = 0
        self._previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the token counter and the clock, and catch each of `SIGNALS` that has a handler already, and SIGHUP.

        Another signal without a handler keeps its default action. Outside the main thread no signal is caught. A resumed run counts from
        its number of tokens so far.
        """
        self.dirpath = Path(trainer.default_root_dir) / "checkpoints"
        self._counter.restart(pl_module.rows_seen)
        self._started_at = self._saved_at = time.monotonic()
        self._batches, self._early, self._received, self._postponed = 0, 0, 0, 0
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                unhandled = (None, signal.SIG_IGN) if number.name == "SIGHUP" else (None, signal.SIG_DFL, signal.SIG_IGN)
                if signal.getsignal(number) not in unhandled:
                    self._previous_handlers[number] = signal.signal(number, self._receive)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a checkpoint if one is due or a signal was received; if a validation follows the step, after the validation.

        After the last step `on_train_end` writes it.
        """
        tokens = pl_module.rows_seen
        self._batches += 1
        request = self._request(tokens, trainer.num_training_batches, next(pl_module.parameters()))
        # After the last step, `on_train_end` writes the checkpoint, once everything else is written.
        if request and not trainer.is_last_batch:
            if validates(trainer):
                self._postponed = request
            else:
                self._answer(trainer, tokens, request)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the checkpoint that was postponed until after this validation."""
        request, self._postponed = self._postponed, 0
        if request:
            self._answer(trainer, pl_module.rows_seen, request)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the checkpoint of the trained run. Until it exists, the run can be resumed from an earlier checkpoint."""
        self._save(trainer, pl_module.rows_seen)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore Lightning's signal handlers."""
        self._restore_handlers()

    def _request(self, tokens: int, batches: float, like: Any) -> int:
        """The checkpoint request that all ranks agree on: the largest code of any rank, 0 for none.

        A code is `2 * i + due`. `i` is the number of the received signal in `SIGNALS`, counted from 1, or 0 without a signal. `due` is 1 if
        an interval has ended.
        """
        due = self._counter.is_due(tokens)
        due |= self._is_early_due(batches)
        due |= self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        # Clocks differ, and a signal reaches one rank before another: the ranks decide together.
        return int(ProcessGroup.default().max_scalar(2 * self._received + due, like))

    def _is_early_due(self, batches: float) -> bool:
        """Whether one of the two checkpoints soon after the start is due, in a run of this many batches."""
        seconds, before = time.monotonic() - self._started_at, self._early
        self._early = (seconds >= EARLIEST_SECONDS and self._batches >= EARLY_SHARE * batches) + (seconds >= EARLY_SECONDS)
        return self._early > before and (self.every_tokens, self.every_minutes) != (None, None)

    def _answer(self, trainer: Trainer, tokens: int, request: int) -> None:
        """Write a checkpoint and then, where the request came from a signal, do what `_obey` does for that signal."""
        self._save(trainer, tokens)
        if request > 1:
            self._obey(trainer, SIGNALS[request // 2 - 1])

    def _save(self, trainer: Trainer, tokens: int) -> None:
        """Write `tokens=N.ckpt`, link `last.ckpt` to it, delete all but the newest `keep` checkpoints. A `fast_dev_run` writes none."""
        assert self.dirpath is not None
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._counter.restart(tokens)
        self._saved_at = time.monotonic()
        path = self.dirpath / f"tokens={tokens}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            link_and_prune(path, self.keep)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: store the most urgent signal; a second Ctrl-C raises KeyboardInterrupt at once."""
        if signal.Signals(number).name == "SIGHUP":
            leave_terminal()
        if number == signal.SIGINT and self._received == SIGNALS.index(signal.SIGINT) + 1:
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            # `print` would fail if the signal came while sys.stderr was being written to.
            os.write(2, b"\nmetasae: stopping after the next step, with a checkpoint; Ctrl-C again stops at once\n")
        self._received = max(self._received, SIGNALS.index(signal.Signals(number)) + 1)

    def _obey(self, trainer: Any, number: signal.Signals) -> None:
        """Do what a signal asks for, after its checkpoint was written.

        SIGTERM, SIGHUP and SIGINT end the process. SIGUSR1 calls Lightning's handler, which asks the batch system for a restart.
        """
        rank_zero_info(f"{number.name}: a checkpoint is written to {self.dirpath}; --ckpt_path last resumes from it")
        self._received = 0
        if number.name == "SIGUSR1":
            if handler := self._previous_handlers.get(number):
                # Lightning's handler asks the batch system to start the run again; the batch system ends this process.
                handler(number, None)
            return
        self._restore_handlers()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a further Ctrl-C may not interrupt the end of the run
        # Lightning's launcher kills all ranks when one that it has started ends with another status than 0.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_launched = isinstance(environment, LightningEnvironment) and trainer.local_rank > 0
        raise SystemExit(0 if is_launched else 128 + number)

    def _restore_handlers(self) -> None:
        """Install again the handlers that the signals had before training."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


def leave_terminal(streams: Sequence[int] = (1, 2)) -> None:
    """Send output to a terminal to the null device: writing to a terminal that has ended is an error. Files and pipes are left alone."""
    null_device = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(null_device, stream)
    os.close(null_device)


def validates(trainer: Any) -> bool:
    """Whether a validation follows the current step. Lightning has no public function that says so."""
    loop = trainer.fit_loop
    return any(trainer.num_val_batches) and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)

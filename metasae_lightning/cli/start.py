"""The start of a run: checks before anything is loaded, log lines held back until they have passed, and no folder after a failure."""

import logging
import os
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

from metasae_lightning import run_folder
from metasae_lightning.data import ActivationsDataModule, SyntheticDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.file_lock import file_lock
from metasae_lightning.lm.device import count_gpus, describe_devices
from metasae_lightning.training.argument_checks import check_data, check_init_from, check_optimizers, check_trainer
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.side_by_side import SideBySide, errors_name_arm

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK")
"""Variables that launchers set before a process knows its rank; one that is not 0 means another rank than the first."""
LIGHTNING_LOGGERS = ("lightning", "lightning.pytorch", "lightning.fabric")


class HeldLines:
    """Holds back Lightning's log lines and Python's warnings until `release`: an `InputError` before that is alone on stderr.

    Any other exception releases them.
    """

    def __enter__(self) -> "HeldLines":
        self._loggers = [(logger, logger.handlers) for logger in map(logging.getLogger, LIGHTNING_LOGGERS)]
        self._held = [MemoryHandler(10_000, logging.CRITICAL + 1, target) for _, handlers in self._loggers for target in handlers]
        held = iter(self._held)
        for logger, handlers in self._loggers:
            logger.handlers = [next(held) for _ in handlers]
        self._warnings: list[tuple[Any, ...]] = []
        self._patch = patch.object(warnings, "showwarning", lambda *args: self._warnings.append(args))
        self._patch.start()
        self._is_holding = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Print the lines, unless the block ended with an `InputError`."""
        self._end(prints=not isinstance(error, InputError))

    def release(self) -> None:
        """Print the lines held back, and hold no more."""
        self._end(prints=True)

    def _end(self, prints: bool) -> None:
        if not self._is_holding:
            return
        self._is_holding = False
        self._patch.stop()
        for logger, handlers in self._loggers:
            logger.handlers = handlers
        for handler in self._held:
            handler.flushOnClose = prints
            handler.close()
        for message, category, file, line, *rest in self._warnings if prints else ():
            warnings.showwarning(message, category, file, line, *rest)


def check_accelerator(accelerator: Any) -> None:
    """Reject a GPU where the machine has none."""
    there_is = {"cuda": count_gpus() > 0, "mps": torch.backends.mps.is_available()}
    there_is["gpu"] = any(there_is.values())
    if not there_is.get(accelerator, True):
        raise InputError(f"trainer.accelerator: {accelerator} is not there: there is {describe_devices(count_gpus())}")


def check_run(model: Any, data: Any, trainer: Any, *, resumes: bool) -> None:
    """Reject arguments that would end the run before its first step, where that is known before anything is loaded.

    Checked are the trainer, the optimisers, the validation tokens, the text and, unless the run `resumes`, the SAEs given by `init_from`.
    """
    check_trainer(trainer)
    batch_size = getattr(getattr(data, "batching", data), "batch_size", None)
    known = trainer.limit_train_batches == 1.0 and trainer.max_epochs == 1 and batch_size and getattr(data, "tokens", None)
    steps = data.tokens // trainer.world_size // batch_size if known else float("inf")
    check_intervals(trainer, steps)
    for name, arm in arms_of(model).items():
        with errors_name_arm(name):
            check_optimizers(arm, steps)
            if arm.objective is not None:
                arm.objective.check(data)
            if batch_size and (parts := arm.primary.config.micro_batches) > batch_size:
                raise InputError(f"micro_batches must be at most the {batch_size:,} rows of a batch, got {parts:,}")
            if not getattr(data, "language_model", None):
                check_data(data, arm.hook, arm.primary.sae.cfg.d_in)
            if not resumes:
                check_init_from(arm)
    if isinstance(data, ActivationsDataModule | SyntheticDataModule):
        check_validation_tokens(data, trainer)
    if isinstance(data, ActivationsDataModule):
        data.check_text(trainer.world_size)


def check_cache(data: Any, shard_gib: float) -> None:
    """Reject data without activations to cache, a shard size that is not above 0, and a folder that holds a run or cannot be written to."""
    if not isinstance(data, ActivationsDataModule):
        raise InputError(f"data: only ActivationsDataModule has activations to cache, got {type(data).__name__}")
    if data.cache is None:
        raise InputError("cache: name the folder to write, --data.init_args.cache FOLDER")
    if not 0 < shard_gib < float("inf"):
        raise InputError(f"shard_gib must be more than 0, got {shard_gib}")
    run_folder.check_writable(data.cache.path, "cache:")
    if (data.cache.path / "config.yaml").exists():
        raise InputError(f"cache: {data.cache.path} holds a run: name another folder")
    data.reading_cache = False
    data.check_text(1)


def check_intervals(trainer: Any, steps: float) -> None:
    """Reject a run without an epoch, intervals that are too short or too long, and trainer options that JointSAE has under another name."""
    if trainer.max_epochs == 0:
        raise InputError("trainer.max_epochs must be at least 1, got 0")
    if trainer.log_every_n_steps < 0:
        raise InputError(f"trainer.log_every_n_steps must be at least 0, got {trainer.log_every_n_steps}")
    interval = getattr(trainer, "val_check_interval", 1.0)
    if interval == 0 or (isinstance(interval, int) and interval > steps and trainer.check_val_every_n_epoch is not None):
        most = "" if steps == float("inf") else f" and at most the run's {steps:,} steps"
        raise InputError(
            f"trainer.val_check_interval must be more than 0{most}, got {interval}; trainer.limit_val_batches: 0 trains without validation"
        )
    for option, is_set, instead in (
        ("accumulate_grad_batches", trainer.accumulate_grad_batches != 1, "micro_batches"),
        ("gradient_clip_val", trainer.gradient_clip_val is not None, "clip_grad_norm"),
    ):
        if is_set:
            raise InputError(f"trainer.{option}: the model takes its own optimiser steps: set model.{instead}")


def check_validation_tokens(data: ActivationsDataModule | SyntheticDataModule, trainer: Any) -> None:
    """Reject fewer validation tokens than a batch on each rank, unless the run does not validate."""
    is_text = isinstance(data, ActivationsDataModule)
    held_out, batch_size = (data.batching.held_out, data.batching.batch_size) if is_text else (1.0, data.batch_size)
    if held_out and trainer.limit_val_batches != 0 and data.validation_tokens // trainer.world_size < batch_size:
        ranks = f" on each of {trainer.world_size} ranks" if trainer.world_size > 1 else ""
        raise InputError(
            f"validation_tokens must fill a batch of {batch_size}{ranks}, got {data.validation_tokens}; "
            "trainer.limit_val_batches: 0 trains without validation"
        )


def arms_of(model: Any) -> dict[str, JointSAE]:
    """The SAEs that a run trains: its arms by name, or one without a name; none of a user's own module."""
    return model.arms if isinstance(model, SideBySide) else {"": model} if isinstance(model, JointSAE) else {}


def lock_run(run: Path, resources: ExitStack) -> None:
    """Lock a run's folder, on the first rank, until `resources` are released; reject one that cannot be written to or is being trained."""
    run_folder.check_writable(run, "--run")
    if not any(os.environ.get(name, "0") not in ("", "0") for name in RANKS):
        resources.enter_context(file_lock(run_folder.lock_file(run), f"--run {run}"))


@contextmanager
def clean_failed_start(run: Path) -> Generator[None, None, None]:
    """If a block raises, remove what it has left without content: TensorBoard's files with no entry, and empty folders.

    Folders that were there before stay.
    """
    run = run.absolute()
    before = {path for path in (run, *run.parents, *run.rglob("*")) if path.is_dir()}
    try:
        yield
    except BaseException:
        for file in run.rglob(f"events.out.tfevents.*.{os.getpid()}.*"):
            if len(list(RawEventFileLoader(str(file)).Load())) < 2:  # the first record is TensorBoard's own
                file.unlink()
                hyperparameters = file.with_name(TensorBoardLogger.NAME_HPARAMS_FILE)
                if hyperparameters.exists() and hyperparameters.read_text().strip() == "{}":
                    hyperparameters.unlink()
        folders = sorted((path for path in run.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
        for folder in (*folders, run, *run.parents):
            if folder not in before:
                with suppress(OSError):  # it has content
                    folder.rmdir()
        raise

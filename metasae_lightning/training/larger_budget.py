"""`LargerBudget`: a finished run goes on where its budget of tokens is larger than it was."""

import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from metasae_lightning import run_folder
from metasae_lightning.atomic_files import draft_of
from metasae_lightning.errors import InputError
from metasae_lightning.schedules import WarmupDecay


class LargerBudget(Callback):
    """Lets a finished run go on from its last checkpoint to a larger budget, and refuses a budget that is used up.

    Stream, counters and optimisers go on. A schedule that knows the length of the run goes on as that of the longer run. The export of
    the first budget stays in `saes/tokens=N`. One line on stderr says so.
    """

    def __init__(self) -> None:
        self._was_finished = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Set the state of Lightning's loops to that after a step that is not the run's last."""
        self._was_finished = is_finished(checkpoint)
        if self._was_finished:
            reopen(checkpoint["loops"]["fit_loop"])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse a budget that is used up; go on with schedules as in a longer run, copy the first export, and say so."""
        done, batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready, trainer.num_training_batches
        if done and done >= batches:
            raise used_up_error(pl_module.rows_seen)
        schedules = restart_schedules(trainer)
        if not self._was_finished or not trainer.is_global_zero:
            return
        keep_export(Path(trainer.default_root_dir), pl_module.rows_seen)
        arms = getattr(pl_module, "arms", {"": pl_module})
        early = any(getattr(arm, "meta", None) is not None and int(arm.primary.steps) % arm.n_p for arm in arms.values())
        meta = ["the meta SAE has taken the steps at the end of the first budget, which a longer run takes later"] if early else []
        line = "; ".join(
            [f"the finished run of {pl_module.rows_seen:,} tokens goes on: {done:,} of {batches:,} batches", *schedules, *meta]
        )
        sys.stderr.write(f"metasae: {line}\n")


def is_finished(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a run at its end."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    return bool(loops) and loops["epoch_progress"]["current"]["completed"] > 0 and loops["epoch_loop.batch_progress"]["is_last_batch"]


def reopen(loops: dict[str, Any]) -> None:
    """Change the loops' state at the end of the last epoch into the state at the end of its last step, as a checkpoint there has it."""
    for counts in loops["epoch_progress"].values():
        counts.update(completed=counts["completed"] - 1, processed=counts["processed"] - 1)
    batches = loops["epoch_loop.batch_progress"]
    for counts in (batches["total"], batches["current"]):
        counts["completed"] -= 1
    batches["is_last_batch"] = False
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for counts in (validation["total"], validation["current"]):
        counts.update(dict.fromkeys(counts, 0))


def used_up_error(tokens: int) -> InputError:
    """The error for a run that has read its budget."""
    return InputError(f"data.init_args.tokens: the run has read its budget of {tokens:,} tokens: set a larger one to go on")


def restart_schedules(trainer: Trainer) -> list[str]:
    """Set each `WarmupDecay` to its learning rate in a run of the length that this one has now. Returns a text for each that changed."""
    texts: list[str] = []
    for schedule in (item.scheduler for item in trainer.lr_scheduler_configs):
        if not isinstance(schedule, WarmupDecay):
            continue
        for group, rate in zip(schedule.optimizer.param_groups, schedule.get_lr(), strict=True):
            if not math.isclose(group["lr"], rate, rel_tol=1e-6):
                texts.append(f"WarmupDecay goes on as in a run of {schedule.total_steps:,} steps, from {group['lr']:.3g} to {rate:.3g}")
            set_rate(group, float(rate))
    return texts


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set a parameter group's learning rate, in place where a CUDA graph reads it from a tensor."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def keep_export(run: Path, tokens: int) -> None:
    """Copy the exports of a run and of its arms, and its record, under the number of tokens that they were trained on."""
    for folder in (run, *run.glob("arms/*")):
        kept = run_folder.exported_sae(folder, f"tokens={tokens}")
        for role in ("primary", "meta"):
            if run_folder.is_exported(folder, role) and not (kept / role).exists():
                with draft_of(kept / role) as draft:
                    shutil.copytree(run_folder.exported_sae(folder, role), draft)
    record = run_folder.record_file(run)
    if record.exists():
        run_folder.write_file(record.with_name(f"{record.stem}.tokens={tokens}.json"), record.read_bytes())

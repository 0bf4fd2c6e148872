"""What joint training demands of its parts and of its trainer, each in one line."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from metasae_lightning.compute.process_group import Ranks
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Penalty
from metasae_lightning.sae import TrainingSAEConfig
from metasae_lightning.training.strategy import Sharded

CHOICES = {"kernels": ("sparse", "dense"), "critic_supports": ("exact", "macro_step"), "non_finite": ("stop", "skip")}
"""What some arguments may be."""


def check_roles(
    primary: TrainingSAEConfig, meta: TrainingSAEConfig | None, penalties: torch.nn.ModuleDict, counts: Mapping[str, int]
) -> None:
    """Penalties need what they are judged by, and counts are counts."""
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    for name, penalty in penalties.items():
        if not isinstance(penalty, Penalty):
            raise InputError(f"penalties.{name} must be a Penalty, got {type(penalty).__name__}")
        if penalty.needs_critic and meta is None:
            raise InputError(f"penalties.{name} ({type(penalty).__name__}) is judged by a meta SAE, and there is none: set model.meta")
    if meta is not None and meta.d_in != primary.d_in:
        raise InputError(f"meta.d_in must be the primary's d_in, since it reads decoder rows: got {meta.d_in}, set d_in: {primary.d_in}")
    if meta is not None and not penalties:
        rank_zero_warn("a meta SAE without penalties trains along and changes nothing: set model.penalties, or meta: null for a solo SAE")


def check_choices(penalties: torch.nn.ModuleDict, **given: str) -> None:
    """What is chosen by name has a name that there is, and goes with the penalties."""
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise InputError(f"{name} must be {' or '.join(CHOICES[name])}, got {value!r}")
    for name, penalty in penalties.items():
        if given["critic_supports"] == "macro_step" and (share := getattr(penalty, "rows", 1.0)) < 1:
            raise InputError(f"critic_supports: macro_step is of every row, and penalties.{name} has others at each step (rows: {share})")


def check_optional_values(
    primary: TrainingSAEConfig,
    meta: TrainingSAEConfig | None,
    *,
    clip_grad_norm: float | None,
    meta_rows: int | None,
    meta_init_from: object,
) -> None:
    """What may be none is in its range where it is not."""
    if clip_grad_norm is not None and clip_grad_norm <= 0:
        raise InputError(f"clip_grad_norm must be more than 0, or none, got {clip_grad_norm}")
    if meta_rows is not None and not 0 < meta_rows <= primary.d_sae:
        raise InputError(f"meta_rows must lie between 1 and the decoder's {primary.d_sae} rows, got {meta_rows}")
    if meta is None and meta_init_from is not None:
        raise InputError("meta_init_from: there is no meta SAE: set model.meta")


def check_data(data: Any, hook: str | None, d_in: int) -> None:
    """Data that have hooks have this one, and it is as wide as the SAE."""
    widths: dict[str, int] = getattr(data, "widths", {})
    if (hook is None and len(widths) > 1) or (hook is not None and hook not in widths):
        raise InputError(f"hook: the data give {', '.join(widths) or 'none that has a name'}: name one of them, got {hook}")
    width = widths.get(hook) if hook else next(iter(widths.values()), None)
    if width is not None and width != d_in:
        raise InputError(f"primary.d_in is {d_in}, but the activations are {width} wide: set d_in: {width}")


def check_ranks(ranks: Ranks, critic_supports: str) -> None:
    """What a critic holds from step to step is of the rows that one process judges, and no checkpoint has it of every rank."""
    if critic_supports == "macro_step" and not ranks.alone:
        raise InputError(f"critic_supports: macro_step is for one process, got {ranks.world_size} ranks: leave it at exact")


def check_batches(trainer: Any, ranks: Ranks, rows_seen: int) -> None:
    """Ranks make every step together, from the same one on: one with more batches would wait for the others for ever."""
    stand = ranks.each(rows_seen, torch.zeros(0, device=trainer.strategy.root_device))
    if len(set(stand)) > 1:
        raise InputError(f"--ckpt_path: ranks went on from different checkpoints, after {', '.join(map(str, stand))} tokens: name a file")
    planned, there = trainer.num_training_batches, sized_len(trainer.train_dataloader)
    limit = trainer.limit_train_batches  # a share, or where it is an integer so many
    if isinstance(limit, float) and limit == 1.0 and there not in (None, planned):
        raise InputError(
            f"data: the run was planned with {planned} batches, and there are {there} now that the checkpoint is read: where the text ends "
            f"before the budget (exhausted: end), a divided dictionary goes on on as many ranks as before, or under trainer.strategy: ddp"
        )
    for what, counts in (("training", [trainer.num_training_batches]), ("validation", trainer.num_val_batches)):
        if all(count != float("inf") for count in counts):
            each = ranks.each(int(sum(counts)), torch.zeros(0, device=trainer.strategy.root_device))
            if len(set(each)) > 1:
                raise InputError(f"data: ranks must have equally many {what} batches, and have {', '.join(map(str, each))}")


def check_trainer(trainer: Any) -> None:
    """What a trainer may be asked for is what training can do."""
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy | Sharded):
        raise InputError(
            f"trainer.strategy must be ddp, sharded, or one made from them, on {trainer.world_size} ranks, got "
            f"{type(trainer.strategy).__name__}"
        )
    if trainer.precision not in ("32-true", "64-true", "bf16-mixed"):
        raise InputError(f"trainer.precision must be 32-true, 64-true or bf16-mixed, got {trainer.precision}")
    if trainer.max_steps != -1:
        raise InputError("trainer.max_steps would end a run inside a macro-step: the budget is data.init_args.tokens")

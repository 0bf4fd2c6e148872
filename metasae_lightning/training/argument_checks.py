"""Checks of JointSAE's arguments, trainer and data: each error is one line."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn

from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.errors import InputError, one_line
from metasae_lightning.heads import Head
from metasae_lightning.objectives import Objective
from metasae_lightning.penalties import Penalty
from metasae_lightning.sae import TrainingSAEConfig
from metasae_lightning.sae.head_loss import HeadTraining
from metasae_lightning.sae.learner import Learner
from metasae_lightning.schedules import bind_schedule, meta_steps_in
from metasae_lightning.training.strategy import Sharded

CHOICES = {"kernels": ("sparse", "dense"), "critic_supports": ("exact", "macro_step"), "non_finite": ("stop", "skip")}
"""Allowed values of arguments that are chosen by name."""


def check_roles(
    primary: TrainingSAEConfig, meta: TrainingSAEConfig | None, penalties: torch.nn.ModuleDict, counts: Mapping[str, int]
) -> None:
    """Reject counts below 1, penalties of another type or without the meta SAE they need, and a meta SAE of another `d_in`.

    A meta SAE without penalties is only warned of.
    """
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


def check_objective(objective: object, primary: TrainingSAEConfig) -> None:
    """Reject an objective of another type, and one for an architecture with a squared error for each of several widths."""
    if objective is not None and not isinstance(objective, Objective):
        raise InputError(f"objective must be an Objective, got {type(objective).__name__}")
    if objective is not None and hasattr(primary, "matryoshka_widths"):
        raise InputError(f"objective takes the place of one squared error, and {type(primary).__name__} has one for each width")


def check_head(head: object, head_training: str, objective: object, init_from: object) -> None:
    """Reject a head of another type, an unknown `head_training`, and `frozen_sae` without the SAE to freeze or with an objective."""
    if head is not None and not isinstance(head, Head):
        raise InputError(f"head must be a Head, got {type(head).__name__}")
    if head_training not in get_args(HeadTraining):
        raise InputError(f"head_training must be {', '.join(get_args(HeadTraining))}, got {head_training!r}")
    if head is None and head_training != "joint":
        raise InputError(f"head_training: {head_training} needs a head, and there is none: set model.head")
    if head_training == "frozen_sae" and (init_from is None or objective is not None):
        raise InputError(
            "head_training: frozen_sae trains the head alone, on the squared error of init_from's SAE: set init_from, no objective"
        )


def set_up_objective(objective: Objective | None, trainer: Any) -> None:
    """Set an objective up on the trainer's data; a run that shards the latents over ranks is an `InputError`."""
    if objective is not None:
        if isinstance(trainer.strategy, Sharded):
            raise InputError("objective: each rank needs the whole reconstruction: set trainer.strategy: ddp, got a sharded one")
        objective.setup(getattr(trainer, "datamodule", None))


def check_choices(penalties: torch.nn.ModuleDict, **choices: str) -> None:
    """Reject values outside `CHOICES`, and `critic_supports: macro_step` together with a penalty on a subset of rows."""
    for name, value in choices.items():
        if value not in CHOICES[name]:
            raise InputError(f"{name} must be {' or '.join(CHOICES[name])}, got {value!r}")
    for name, penalty in penalties.items():
        if choices["critic_supports"] == "macro_step" and (fraction := getattr(penalty, "rows", 1.0)) < 1:
            raise InputError(f"critic_supports: macro_step needs all rows, and penalties.{name} draws rows at each step (rows: {fraction})")


def check_optional_values(
    primary: TrainingSAEConfig,
    meta: TrainingSAEConfig | None,
    *,
    clip_grad_norm: float | None,
    meta_rows: int | None,
    meta_init_from: object,
) -> None:
    """Check `clip_grad_norm` and `meta_rows` where they are set, and that `meta_init_from` comes with a meta SAE."""
    if clip_grad_norm is not None and clip_grad_norm <= 0:
        raise InputError(f"clip_grad_norm must be more than 0, or null, got {clip_grad_norm}")
    if meta_rows is not None and not 0 < meta_rows <= primary.d_sae:
        raise InputError(f"meta_rows must lie between 1 and the decoder's {primary.d_sae} rows, got {meta_rows}")
    if meta is None and meta_init_from is not None:
        raise InputError("meta_init_from: there is no meta SAE: set model.meta")


def check_data(data: Any, hook: str | None, d_in: int) -> None:
    """Check that the data have the hook, and that its activations are as wide as the SAE."""
    check_widths(getattr(data, "widths", {}), hook, d_in)


def check_widths(widths: Mapping[str, int], hook: str | None, d_in: int) -> None:
    """Check that `hook`, or the only hook, is among the `widths` by hook, and that its activations are as wide as the SAE."""
    if (hook is None and len(widths) > 1) or (hook is not None and hook not in widths):
        raise InputError(f"hook: the data give {', '.join(widths) or 'no hook with a name'}: name one of them, got {hook}")
    width = widths.get(hook) if hook else next(iter(widths.values()), None)
    if width is not None and width != d_in:
        raise InputError(f"primary.d_in is {d_in}, but the activations are {width} wide: set d_in: {width}")


def check_ranks(ranks: ProcessGroup, critic_supports: str) -> None:
    """Reject `critic_supports: macro_step` on several ranks: a checkpoint saves the critic's cached support of one process only."""
    if critic_supports == "macro_step" and not ranks.is_single:
        raise InputError(f"critic_supports: macro_step is for one process, got {ranks.world_size} ranks: leave it at exact")


def check_batches(trainer: Any, ranks: ProcessGroup, rows_seen: int) -> None:
    """Check that ranks have seen equally many tokens and have equally many batches: as many as Lightning planned at first.

    Ranks take every step together, so a rank with more batches would wait for the others for ever.
    """
    tokens = ranks.gather_int(rows_seen, torch.zeros(0, device=trainer.strategy.root_device))
    if len(set(tokens)) > 1:
        raise InputError(f"--ckpt_path: ranks resumed from different checkpoints, after {', '.join(map(str, tokens))} tokens: name a file")
    planned, available = trainer.num_training_batches, sized_len(trainer.train_dataloader)
    limit = trainer.limit_train_batches  # a float is a fraction, an integer is a number of batches
    if isinstance(limit, float) and limit == 1.0 and available not in (None, planned):
        raise InputError(
            f"data: the run was planned with {planned} batches, and there are {available} now that the checkpoint is read: where the text "
            f"ends before the budget (exhausted: end), a sharded SAE resumes on as many ranks as before, or under trainer.strategy: ddp"
        )
    for split, counts in (("training", [trainer.num_training_batches]), ("validation", trainer.num_val_batches)):
        if all(count != float("inf") for count in counts):
            per_rank = ranks.gather_int(int(sum(counts)), torch.zeros(0, device=trainer.strategy.root_device))
            if len(set(per_rank)) > 1:
                raise InputError(f"data: ranks must have equally many {split} batches, and have {', '.join(map(str, per_rank))}")


def check_trainer(trainer: Any, head: object = None) -> None:
    """Reject strategies, precisions and `max_steps` that joint training does not support."""
    if head is not None and isinstance(trainer.strategy, Sharded):
        raise InputError("head: each rank needs the codes of all latents: set trainer.strategy: ddp, got a sharded one")
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy | Sharded):
        raise InputError(
            f"trainer.strategy must be ddp, sharded, or one made from them, on {trainer.world_size} ranks, got "
            f"{type(trainer.strategy).__name__}"
        )
    if trainer.precision not in ("32-true", "64-true", "bf16-mixed"):
        raise InputError(f"trainer.precision must be 32-true, 64-true or bf16-mixed, got {trainer.precision}")
    if trainer.max_steps != -1:
        raise InputError("trainer.max_steps would end a run inside a macro-step: the budget is data.init_args.tokens")


def open_init_from(primary: Learner, meta: Learner | None, trainer: Any, hook: str | None) -> None:
    """Load and check the SAEs given by `init_from`, except in a resumed run, whose SAEs are initialised."""
    metadata = getattr(getattr(trainer, "datamodule", None), "metadata", None)
    for learner in filter(None, (primary, meta)):
        if learner.config.init_from is not None and not learner.initialized:
            learner.config.init_from.open(learner.role, learner.sae.cfg)
            if learner is primary and metadata is not None:
                learner.config.init_from.check(metadata(*([hook] if hook else [])))


def check_optimizers(model: Any, steps: float) -> None:
    """Make the optimiser and the schedule of each SAE for one number: a wrong argument is then an `InputError` before anything is loaded.

    A meta SAE whose latents would always be dead is an `InputError` too.

    Args:
        model: The JointSAE.
        steps: Primary steps of the run, as far as known; infinite if not.
    """
    if model.meta is not None and model.meta.config.dead_after < 1:
        raise InputError("meta_dead_after_steps must be at least 1")
    for role in ("primary", "meta") if model.meta is not None else ("primary",):
        with argument_errors(f"{role}_optimizer"):
            optimizer = model._optimizer_callables[role]([torch.nn.Parameter(torch.zeros(1))])
        if (make_schedule := model._scheduler_callables[role]) is not None:
            with argument_errors(f"{role}_scheduler"):
                schedule = make_schedule(optimizer)
            sae_steps = steps if role == "primary" else meta_steps_in(steps, n_p=model.n_p, n_m=model.n_m)
            if steps != float("inf"):
                bind_schedule(schedule, sae_steps, role)


@contextmanager
def argument_errors(name: str) -> Generator[None, None, None]:
    """Raise a library's error about its arguments as an `InputError` that begins with `name`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"{name}: {one_line(error)}") from error


def check_init_from(model: Any) -> None:
    """Open the SAEs given by `init_from`, and check their widths; a model that is then loaded opens them again."""
    for learner in filter(None, (model.primary, model.meta)):
        if learner.config.init_from is not None:
            learner.config.init_from.open(learner.role, learner.sae.cfg)

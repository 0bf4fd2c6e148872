"""All ranks skip a step with a NaN or infinity, and the skipped step changes nothing but the counts."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor

from metasae_lightning.callbacks import Checkpoints, StopOnNaN
from metasae_lightning.compute.process_group import SINGLE, ProcessGroup
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability, Penalty
from metasae_lightning.sae.nonfinite import NonFiniteGuard, first_nonfinite
from metasae_lightning.schedules import WarmupDecay
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE, SideBySide
from metasae_lightning.training.argument_checks import check_choices
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO, newest_intact
from tests.helpers.architectures import activations, config, optimizers
from tests.helpers.ranks import in_process_group

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Batches:
    """Batches by their numbers; in those numbered `bad`, one row is `value`."""

    def __init__(self, numbers: list[int], bad: tuple[int, ...] = (), value: float = torch.nan):
        self.numbers, self.bad, self.value = numbers, bad, value

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor]:
        for number in self.numbers:
            batch = activations(number)
            if number in self.bad:
                batch[7] = self.value
            yield batch


class Poison(Callback):
    """Put a NaN into the activations, or into a gradient of the primary or meta SAE, on one rank at one batch."""

    def __init__(self, at: int, target: str = "activations", rank: int = 0) -> None:
        self.at, self.target, self.rank = at, target, rank
        self.now = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.now = batch_idx == self.at and trainer.global_rank == self.rank
        if self.now and self.target == "activations":
            Batch.of(batch).activations[3] = torch.nan

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        learner = getattr(pl_module, self.target, None)
        if self.now and learner is not None and learner.sae.b_enc.grad is not None:
            learner.sae.b_enc.grad[3] = torch.nan


class InfiniteOnce(Penalty):
    """A penalty that is infinite at one call with gradients: the one after `at` others."""

    def __init__(self, weight: float, at: int) -> None:
        super().__init__(weight)
        self.left = at

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        self.left -= torch.is_grad_enabled()
        return W_dec.square().mean() / (0.0 if self.left == -1 and torch.is_grad_enabled() else 1.0)


class SwitchedInfinite(Penalty):
    """A penalty that is infinite while `infinite` is set; its gradient is finite."""

    infinite = False

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        return W_dec[:, 0].mean() + (torch.inf if self.infinite else 0.0)


def joint(architecture: str = "batchtopk", **changes: Any) -> JointSAE:
    def schedule(optimizer: Any) -> WarmupDecay:
        return WarmupDecay(optimizer, warmup=4, decay=0.5, total_steps=12)

    rates: dict[str, Any] = {"primary_scheduler": schedule, "meta_scheduler": schedule}
    sizes: dict[str, Any] = {"n_p": 3, "n_m": 2, "dead_after_tokens": 128, "non_finite": "skip"}
    whitened = {"normalize_activations": "covariance_whitening"} if architecture == "whitened" else {}
    primary = config("batchtopk" if whitened else architecture, **whitened)
    return JointSAE(primary, config("batchtopk", d_sae=8), **{"penalties": {"d": Decomposability(0.3)}, **rates, **sizes, **changes})


def fit_module(folder: Path, module: Any, batches: Any, *callbacks: Callback, **fit_args: Any) -> Trainer:
    saves = any(isinstance(callback, Checkpoints) for callback in callbacks)
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": saves, **QUIET}
    trainer = Trainer(**options, callbacks=list(callbacks))
    trainer.fit(module, batches, **fit_args)
    return trainer


def moments(states: Any) -> dict[str, Tensor]:
    """The tensors in the states of several optimisers, by name."""
    return {
        f"optimizer {number}, {parameter}, {name}": value
        for number, optimizer_state in enumerate(states)
        for parameter, state in optimizer_state["state"].items()
        for name, value in state.items()
    }


def training_state(module: torch.nn.Module, optimizers: Any, schedules: Any = ()) -> dict[str, Tensor]:
    """Everything that an applied step changes, by name: weights, statistics, optimiser states, learning rates, schedules."""
    state = {name: value for name, value in module.state_dict().items() if not name.endswith("rows_seen")}
    state |= moments([optimizer.state_dict() for optimizer in optimizers])
    for number, optimizer in enumerate(optimizers):
        state[f"rate {number}"] = torch.tensor([group["lr"] for group in optimizer.param_groups])
    for number, schedule in enumerate(schedules):
        state[f"schedule {number}"] = torch.tensor(schedule.scheduler.last_epoch)
    return state


def fit_state(module: torch.nn.Module, trainer: Trainer) -> dict[str, Tensor]:
    """The training state of a module, with the optimisers and schedules of its trainer."""
    return training_state(module, trainer.optimizers, trainer.lr_scheduler_configs)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """The names of the entries that are not bit-equal."""
    assert first.keys() == second.keys()
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


# The bad batch is the first (which statistics are computed from), inside a macro-step, at its end, after it, or the last of the run.
@pytest.mark.parametrize(
    ("architecture", "at", "count"),
    [
        *(("batchtopk", at, 9) for at in (0, 4, 5, 6, 9)),
        ("batchtopk", 10, 10),
        ("whitened", 0, 4),
        ("matryoshka_batchtopk", 2, 4),
        ("gated", 2, 4),
    ],
)
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_a_run_with_a_skipped_batch_equals_a_run_without_that_batch(architecture: str, at: int, count: int, tmp_path: Path):
    skipping, shorter = joint(architecture), joint(architecture)
    other_batches = [number for number in range(count + 1) if number != at]
    trainer = fit_module(tmp_path, skipping, Batches([*range(count + 1)], bad=(at,), value=[torch.nan, torch.inf][at % 2]), StopOnNaN())
    shorter_trainer = fit_module(tmp_path, shorter, Batches(other_batches))
    assert (
        not differing(fit_state(skipping, trainer), fit_state(shorter, shorter_trainer)) and first_nonfinite(skipping.state_dict()) is None
    )
    assert skipping.rows_seen == shorter.rows_seen + 64 == 64 * (count + 1)
    assert trainer.callback_metrics["train/skipped"] == 1 and shorter_trainer.callback_metrics["train/skipped"] == 0


# Control: one more applied batch changes the state that the test above compares.
def test_a_batch_that_is_not_skipped_changes_the_training_state(tmp_path: Path):
    skipping, shorter = joint(), joint()
    trainer, shorter_trainer = (
        fit_module(tmp_path, skipping, Batches([*range(10)])),
        fit_module(tmp_path, shorter, Batches([0, 1, 2, 3, 5, 6, 7, 8, 9])),
    )
    names = differing(fit_state(skipping, trainer), fit_state(shorter, shorter_trainer))
    assert {"primary.sae.topk_threshold", "primary.steps", "primary.updates", "optimizer 0, 0, exp_avg", "schedule 0", "rate 0"} < {*names}


@pytest.mark.parametrize("target", ["activations", "primary", "meta"])
def test_a_run_that_stops_keeps_its_last_good_checkpoint(target: str, tmp_path: Path):
    with pytest.raises(
        InputError, match=f"not finite after 384 tokens; .* the last good checkpoint is {tmp_path}/checkpoints/tokens=320.ckpt"
    ):
        fit_module(tmp_path, joint(non_finite="stop"), Batches([*range(9)]), StopOnNaN(), Poison(5, target), Checkpoints(every_tokens=64))
    good, damaged = newest_intact([tmp_path / "checkpoints"])
    assert good is not None and good.name == "tokens=320.ckpt" and not damaged
    assert first_nonfinite(torch.load(good, weights_only=False)["state_dict"]) is None


def test_a_nan_in_one_gradient_skips_the_step(tmp_path: Path):
    skipping, shorter = joint(), joint()
    trainer = fit_module(tmp_path, skipping, Batches([*range(9)]), Poison(4, "primary"), StopOnNaN())
    shorter_trainer = fit_module(tmp_path, shorter, Batches([0, 1, 2, 3, 5, 6, 7, 8]))
    assert not differing(fit_state(skipping, trainer), fit_state(shorter, shorter_trainer))


class StateRecorder(Callback):
    """Records the training state before and after each batch."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append({name: value.clone() for name, value in fit_state(pl_module, trainer).items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append({name: value.clone() for name, value in fit_state(pl_module, trainer).items()})


def test_a_skipped_meta_step_leaves_the_primary_step_applied(tmp_path: Path):
    recorder, expected = StateRecorder(), StateRecorder()
    skipping = joint(n_m=1)
    trainer = fit_module(tmp_path, skipping, Batches([*range(7)]), recorder, Poison(5, "meta"), StopOnNaN())
    fit_module(tmp_path, joint(n_m=1), Batches([*range(7)]), expected)
    meta_names = {name for name in recorder.after[5] if name.startswith(("meta.", "optimizer 1", "rate 1", "schedule 1"))}
    assert not meta_names & {*differing(recorder.before[5], recorder.after[5])} and meta_names & {
        *differing(expected.before[5], expected.after[5])
    }
    assert not {*differing(recorder.after[5], expected.after[5])} - meta_names  # the primary's step was applied
    assert trainer.callback_metrics["train/skipped"] == 1 and int(skipping.primary.steps) == 7 and int(skipping.meta.steps) == 2  # pyright: ignore


def test_too_many_skips_in_a_row_end_the_run(tmp_path: Path):
    not_stopped = joint()
    trainer = fit_module(tmp_path, not_stopped, Batches([*range(10)], bad=(1, 2, 4, 5)), StopOnNaN(skips=3))
    assert int(not_stopped.primary.steps) == 6 and trainer.callback_metrics["train/skipped"] == 4
    message = "^the primary SAE's loss was not finite in the last of 3 steps that were left out in a row, after 448 tokens; no checkpoint"
    stopped = joint()
    with pytest.raises(InputError, match=f"{message}.* the activations of this batch are not finite either"):
        fit_module(tmp_path, stopped, Batches([*range(10)], bad=(1, 2, 4, 5, 6)), StopOnNaN(skips=3))
    assert first_nonfinite(stopped.state_dict()) is None and int(stopped.primary.steps) == 2
    # The first is a penalty that is infinite at a step that is never applied. In the second every meta step is skipped, while primary
    # steps between them are applied.
    with pytest.raises(InputError, match=r"the penalties' sum was not finite in the last of 2 steps .* after 320 tokens"):
        fit_module(tmp_path, joint(penalties={"own": InfiniteAtStep3(0.1)}), Batches([*range(10)]), StopOnNaN(skips=2))
    with pytest.raises(InputError, match=r"the gradient of meta\.sae\.b_enc was not finite in the last of 4 steps .* after 384 tokens"):
        fit_module(tmp_path, joint(), Batches([*range(10)]), *(Poison(at, "meta") for at in (2, 5, 8)), StopOnNaN(skips=4))
    with pytest.raises(InputError, match="skips must be at least 1, got 0"):
        StopOnNaN(skips=0)
    with pytest.raises(InputError, match="non_finite must be stop or skip, got 'leap'"):
        check_choices(torch.nn.ModuleDict(), critic_supports="exact", non_finite="leap")


class InfiniteAtStep3(Penalty):
    """A penalty that is infinite at step 3, which therefore is never applied."""

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        return W_dec.square().mean() / (0.0 if step == 3 else 1.0)


def test_a_resumed_run_can_skip_the_batches_that_stopped_it(tmp_path: Path):
    bad = {"bad": (6, 7)}
    with pytest.raises(InputError, match="the primary's loss is not finite after 448 tokens"):
        fit_module(tmp_path, joint(non_finite="stop"), Data(**bad), StopOnNaN(), Checkpoints(every_tokens=128))
    resumed, uninterrupted = joint(), joint()
    trainer = fit_module(tmp_path, resumed, Data(**bad), StopOnNaN(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert trainer.callback_metrics["train/skipped"] == 2
    assert not differing(fit_state(resumed, trainer), fit_state(uninterrupted, fit_module(tmp_path, uninterrupted, Data(**bad))))
    assert resumed.rows_seen == uninterrupted.rows_seen == 640


class Data(LightningDataModule):
    """Ten batches whose position is saved in checkpoints."""

    def __init__(self, bad: tuple[int, ...]) -> None:
        super().__init__()
        self.bad, self.done = bad, 0

    def train_dataloader(self) -> Any:
        return self

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.done, 10):
            self.done = number + 1
            yield from Batches([number], self.bad)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = state_dict["done"]


def test_one_arm_skips_a_step_that_others_apply(tmp_path: Path):
    arms = SideBySide({"bad": joint(penalties={"own": InfiniteOnce(0.1, 4)}), "good": joint()})
    trainer = fit_module(tmp_path, arms, Batches([*range(8)]), StopOnNaN(skips=2))
    bad, good = joint(penalties={"own": InfiniteOnce(0.1, 99)}), joint()
    fit_module(tmp_path, bad, Batches([0, 1, 2, 3, 5, 6, 7]))
    fit_module(tmp_path, good, Batches([*range(8)]))
    for name, alone in (("bad", bad), ("good", good)):
        assert not differing(training_state(arms.arms[name], ()), training_state(alone, ()))
    assert trainer.callback_metrics["bad/train/skipped"] == 1 and trainer.callback_metrics["good/train/skipped"] == 0 and not arms.stopped


def train_on_ranks(
    ranks: ProcessGroup, steps: list[int], cut: str, *, bad: int | None = None, target: str = "activations", mode: str = "skip"
) -> Any:
    """The state after a run on this rank's rows, and the guards' counts; at step `bad`, `target` is not finite on the last rank."""
    overflowing = SwitchedInfinite(0.1)
    module = joint(non_finite=mode, batch_cut=cut, n_p=2, penalties={"d": Decomposability(0.3), "own": overflowing}).double()
    module.join(ranks)
    primary, meta = optimizers(module)
    for step in steps:
        rows = activations(step).double()[ranks.even_slice(64)].clone()
        is_bad = step == bad and ranks.rank == ranks.world_size - 1
        overflowing.infinite = is_bad and target == "loss"
        if is_bad and target == "activations":
            rows[5] = torch.nan
        handle = module.primary.sae.b_enc.register_hook(lambda gradient: gradient * torch.nan) if is_bad and target == "gradient" else None
        module.step(Batch(rows), primary, meta, last=step == steps[-1])
        if handle is not None:
            handle.remove()
    return training_state(module, (primary, meta)), {role: guard.state_dict() for role, guard in module.guards.items()}


def run_all_cases(rank: int, folder: str) -> None:
    results: dict[str, Any] = {}
    for cut in ("global", "local"):
        results[f"{cut}, without"] = train_on_ranks(ProcessGroup.default(), [0, 1, 2, 4, 5], cut)
        for target in ("activations", "gradient", "loss"):
            results[f"{cut}, {target}"] = train_on_ranks(ProcessGroup.default(), [0, 1, 2, 3, 4, 5], cut, bad=3, target=target)
    bytes_sent = {}
    for mode in ("stop", "skip"):
        group = replace(ProcessGroup.default(), bytes_sent=[])
        train_on_ranks(group, [0, 1, 2, 3], "global", mode=mode)
        bytes_sent[mode] = group.bytes_sent
    trainer_results = {mode: fit_on_two_ranks(rank, Path(folder) / mode, mode) for mode in ("stop", "skip")}
    torch.save({**results, "bytes_sent": bytes_sent, "trainer": trainer_results}, f"{folder}/{rank}.pt")


def fit_on_two_ranks(rank: int, folder: Path, mode: str) -> dict[str, Any]:
    """A run of two ranks with a checkpoint after each step; rank 1 gets bad activations at one step, rank 0 a bad gradient at another."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    module, data = joint(non_finite=mode), Batches([*range(10 * rank, 10 * rank + 8)])
    poison = Poison(4, rank=1), Poison(6, "primary", rank=0)
    callbacks = [StopOnNaN(), *poison, Checkpoints(every_tokens=128, keep=9)]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        default_root_dir=folder,
        plugins=[AtomicCheckpointIO()],
        callbacks=callbacks,
        **QUIET,
    )
    try:
        trainer.fit(module, data)
    except InputError as error:
        return {"error": str(error)}
    return {"state": fit_state(module, trainer), "skipped": trainer.callback_metrics["train/skipped"]}


def test_all_ranks_skip_a_step_that_is_not_finite_on_one_rank(tmp_path: Path):
    in_process_group(2, run_all_cases, tmp_path)
    results_0, results_1 = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for rank, result in enumerate((results_0["trainer"]["stop"], results_1["trainer"]["stop"])):
        bad_tensor = "the primary's loss" if rank else r"(the primary's loss|primary\.sae\.\w+)"
        assert re.match(
            f"{bad_tensor} is not finite after 640 tokens; no checkpoint .* is {tmp_path}/stop/checkpoints/tokens=512.ckpt", result["error"]
        )
    good, damaged = newest_intact([tmp_path / "stop" / "checkpoints"])
    assert good is not None and good.name == "tokens=512.ckpt" and not damaged
    last_state = torch.load(good, weights_only=False)["state_dict"]
    assert first_nonfinite(last_state) is None and int(last_state["primary.steps"]) == 4
    result, other_result = results_0["trainer"]["skip"], results_1["trainer"]["skip"]
    assert not differing(result["state"], other_result["state"]) and first_nonfinite(result["state"]) is None
    assert result["skipped"] == other_result["skipped"] == 2 and int(result["state"]["primary.steps"]) == 6
    # Between the checkpoints around a skipped step, only the number of rows has changed.
    before, after = (torch.load(tmp_path / "skip" / "checkpoints" / f"tokens={tokens}.ckpt", weights_only=False) for tokens in (768, 896))
    assert differing(before["state_dict"], after["state_dict"]) == ["primary.rows_seen"]
    assert not differing(moments(before["optimizer_states"]), moments(after["optimizer_states"]))
    assert before["lr_schedulers"] == after["lr_schedulers"]
    for cut in ("global", "local"):
        for target in ("activations", "gradient", "loss"):
            (state, counts), (other_state, other_counts), (state_without, _) = (
                results_0[f"{cut}, {target}"],
                results_1[f"{cut}, {target}"],
                results_0[f"{cut}, without"],
            )
            assert not differing(state, other_state) and not differing(state, state_without), (cut, target)
            assert counts == other_counts == {"primary": {"total": 1, "in_a_row": 0}, "meta": {"total": 0, "in_a_row": 0}}
    # The guard sends eight bytes per step, for four primary and four meta steps, and nothing else.
    assert (
        len(results_0["bytes_sent"]["skip"]) == len(results_0["bytes_sent"]["stop"]) + 8
        and sum(results_0["bytes_sent"]["skip"]) == sum(results_0["bytes_sent"]["stop"]) + 64
    )


def test_a_guard_checks_every_tensor_and_restores_buffers():
    guard, buffer = NonFiniteGuard(), torch.tensor([1.0, 2.0])
    guard.remember({"buffer": buffer})
    buffer += 1
    assert not guard.skips({"loss": torch.tensor(1e38), "gradient": torch.full((4,), 3e38)}, {"buffer": buffer}, SINGLE)
    assert buffer.tolist() == [2.0, 3.0] and guard.state_dict() == {"total": 0, "in_a_row": 0}
    for number, tensors in enumerate(({"loss": torch.tensor(torch.inf), "g": buffer}, {"loss": torch.tensor(1.0), "g": buffer / 0}), 1):
        assert guard.skips(tensors, {"buffer": buffer}, SINGLE) and buffer.tolist() == [1.0, 2.0]
        assert guard.bad_tensor == ("loss", "g")[number - 1] and guard.state_dict() == {"total": number, "in_a_row": number}
    assert not guard.skips({"loss": torch.tensor(1.0)}, {}, SINGLE) and guard.state_dict() == {"total": 2, "in_a_row": 0}

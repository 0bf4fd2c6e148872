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

    def __init__(self, at: int, what: str = "activations", rank: int = 0) -> None:
        self.at, self.what, self.rank = at, what, rank
        self.now = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.now = batch_idx == self.at and trainer.global_rank == self.rank
        if self.now and self.what == "activations":
            Batch.of(batch).activations[3] = torch.nan

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        learner = getattr(pl_module, self.what, None)
        if self.now and learner is not None and learner.sae.b_enc.grad is not None:
            learner.sae.b_enc.grad[3] = torch.nan


class Once(Penalty):
    """A penalty that is infinite once: at the call with gradients that `at` others precede."""

    def __init__(self, weight: float, at: int) -> None:
        super().__init__(weight)
        self.left = at

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        self.left -= torch.is_grad_enabled()
        return W_dec.square().mean() / (0.0 if self.left == -1 and torch.is_grad_enabled() else 1.0)


class Overflowing(Penalty):
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


def fitted(folder: Path, module: Any, batches: Any, *callbacks: Callback, **more: Any) -> Trainer:
    saves = any(isinstance(callback, Checkpoints) for callback in callbacks)
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": saves, **QUIET}
    trainer = Trainer(**options, callbacks=list(callbacks))
    trainer.fit(module, batches, **more)
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


def everything(module: torch.nn.Module, trainer: Trainer) -> dict[str, Tensor]:
    """The training state under a trainer."""
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
    rest = [number for number in range(count + 1) if number != at]
    trainer = fitted(tmp_path, skipping, Batches([*range(count + 1)], bad=(at,), value=[torch.nan, torch.inf][at % 2]), StopOnNaN())
    without = fitted(tmp_path, shorter, Batches(rest))
    assert not differing(everything(skipping, trainer), everything(shorter, without)) and first_nonfinite(skipping.state_dict()) is None
    assert skipping.rows_seen == shorter.rows_seen + 64 == 64 * (count + 1)
    assert trainer.callback_metrics["train/skipped"] == 1 and without.callback_metrics["train/skipped"] == 0


# Control: one batch more changes what the test above compares.
def test_a_batch_that_is_not_skipped_changes_the_training_state(tmp_path: Path):
    skipping, shorter = joint(), joint()
    trainer, without = fitted(tmp_path, skipping, Batches([*range(10)])), fitted(tmp_path, shorter, Batches([0, 1, 2, 3, 5, 6, 7, 8, 9]))
    found = differing(everything(skipping, trainer), everything(shorter, without))
    assert {"primary.sae.topk_threshold", "primary.steps", "primary.updates", "optimizer 0, 0, exp_avg", "schedule 0", "rate 0"} < {*found}


@pytest.mark.parametrize("what", ["activations", "primary", "meta"])
def test_a_run_that_stops_keeps_its_last_good_checkpoint(what: str, tmp_path: Path):
    with pytest.raises(
        InputError, match=f"not finite after 384 tokens; .* the last good checkpoint is {tmp_path}/checkpoints/tokens=320.ckpt"
    ):
        fitted(tmp_path, joint(non_finite="stop"), Batches([*range(9)]), StopOnNaN(), Poison(5, what), Checkpoints(every_tokens=64))
    good, damaged = newest_intact([tmp_path / "checkpoints"])
    assert good is not None and good.name == "tokens=320.ckpt" and not damaged
    assert first_nonfinite(torch.load(good, weights_only=False)["state_dict"]) is None


def test_a_nan_in_one_gradient_is_enough_to_skip(tmp_path: Path):
    skipping, shorter = joint(), joint()
    trainer = fitted(tmp_path, skipping, Batches([*range(9)]), Poison(4, "primary"), StopOnNaN())
    without = fitted(tmp_path, shorter, Batches([0, 1, 2, 3, 5, 6, 7, 8]))
    assert not differing(everything(skipping, trainer), everything(shorter, without))


class StateRecorder(Callback):
    """Records the training state before and after each batch."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append({name: value.clone() for name, value in everything(pl_module, trainer).items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after.append({name: value.clone() for name, value in everything(pl_module, trainer).items()})


def test_a_skipped_meta_step_leaves_the_primary_step_applied(tmp_path: Path):
    recorder, expected = StateRecorder(), StateRecorder()
    skipping = joint(n_m=1)
    trainer = fitted(tmp_path, skipping, Batches([*range(7)]), recorder, Poison(5, "meta"), StopOnNaN())
    fitted(tmp_path, joint(n_m=1), Batches([*range(7)]), expected)
    of_meta = {name for name in recorder.after[5] if name.startswith(("meta.", "optimizer 1", "rate 1", "schedule 1"))}
    assert not of_meta & {*differing(recorder.before[5], recorder.after[5])} and of_meta & {
        *differing(expected.before[5], expected.after[5])
    }
    assert not {*differing(recorder.after[5], expected.after[5])} - of_meta  # the primary's step was applied
    assert trainer.callback_metrics["train/skipped"] == 1 and int(skipping.primary.steps) == 7 and int(skipping.meta.steps) == 2  # pyright: ignore


def test_too_many_skips_in_a_row_end_the_run(tmp_path: Path):
    fine = joint()
    trainer = fitted(tmp_path, fine, Batches([*range(10)], bad=(1, 2, 4, 5)), StopOnNaN(skips=3))
    assert int(fine.primary.steps) == 6 and trainer.callback_metrics["train/skipped"] == 4
    says = "^the primary SAE's loss was not finite in the last of 3 steps that were left out in a row, after 448 tokens; no checkpoint"
    stopped = joint()
    with pytest.raises(InputError, match=f"{says}.* the activations of this batch are not finite either"):
        fitted(tmp_path, stopped, Batches([*range(10)], bad=(1, 2, 4, 5, 6)), StopOnNaN(skips=3))
    assert first_nonfinite(stopped.state_dict()) is None and int(stopped.primary.steps) == 2
    # The first is a penalty that is infinite at a step that is never applied. In the second every meta step is skipped, while primary
    # steps between them are applied.
    with pytest.raises(InputError, match=r"the penalties' sum was not finite in the last of 2 steps .* after 320 tokens"):
        fitted(tmp_path, joint(penalties={"own": AtThree(0.1)}), Batches([*range(10)]), StopOnNaN(skips=2))
    with pytest.raises(InputError, match=r"the gradient of meta\.sae\.b_enc was not finite in the last of 4 steps .* after 384 tokens"):
        fitted(tmp_path, joint(), Batches([*range(10)]), *(Poison(at, "meta") for at in (2, 5, 8)), StopOnNaN(skips=4))
    with pytest.raises(InputError, match="skips must be at least 1, got 0"):
        StopOnNaN(skips=0)
    with pytest.raises(InputError, match="non_finite must be stop or skip, got 'leap'"):
        check_choices(torch.nn.ModuleDict(), critic_supports="exact", non_finite="leap")


class AtThree(Penalty):
    """A penalty that is infinite at step 3, which therefore is never applied."""

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        return W_dec.square().mean() / (0.0 if step == 3 else 1.0)


def test_a_resumed_run_can_skip_the_batches_that_stopped_it(tmp_path: Path):
    bad = {"bad": (6, 7)}
    with pytest.raises(InputError, match="the primary's loss is not finite after 448 tokens"):
        fitted(tmp_path, joint(non_finite="stop"), Data(**bad), StopOnNaN(), Checkpoints(every_tokens=128))
    resumed, whole = joint(), joint()
    trainer = fitted(tmp_path, resumed, Data(**bad), StopOnNaN(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert trainer.callback_metrics["train/skipped"] == 2
    assert not differing(everything(resumed, trainer), everything(whole, fitted(tmp_path, whole, Data(**bad))))
    assert resumed.rows_seen == whole.rows_seen == 640


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
    arms = SideBySide({"bad": joint(penalties={"own": Once(0.1, 4)}), "good": joint()})
    trainer = fitted(tmp_path, arms, Batches([*range(8)]), StopOnNaN(skips=2))
    bad, good = joint(penalties={"own": Once(0.1, 99)}), joint()
    fitted(tmp_path, bad, Batches([0, 1, 2, 3, 5, 6, 7]))
    fitted(tmp_path, good, Batches([*range(8)]))
    for name, alone in (("bad", bad), ("good", good)):
        assert not differing(training_state(arms.arms[name], ()), training_state(alone, ()))
    assert trainer.callback_metrics["bad/train/skipped"] == 1 and trainer.callback_metrics["good/train/skipped"] == 0 and not arms.stopped


def trained(
    ranks: ProcessGroup, steps: list[int], cut: str, *, bad: int | None = None, what: str = "activations", mode: str = "skip"
) -> Any:
    """The state after a run on this rank's rows, and the guards' counts; at step `bad`, `what` is not finite on the last rank."""
    overflowing = Overflowing(0.1)
    module = joint(non_finite=mode, batch_cut=cut, n_p=2, penalties={"d": Decomposability(0.3), "own": overflowing}).double()
    module.join(ranks)
    primary, meta = optimizers(module)
    for step in steps:
        rows = activations(step).double()[ranks.even_slice(64)].clone()
        is_bad = step == bad and ranks.rank == ranks.world_size - 1
        overflowing.infinite = is_bad and what == "loss"
        if is_bad and what == "activations":
            rows[5] = torch.nan
        handle = module.primary.sae.b_enc.register_hook(lambda gradient: gradient * torch.nan) if is_bad and what == "gradient" else None
        module.step(Batch(rows), primary, meta, last=step == steps[-1])
        if handle is not None:
            handle.remove()
    return training_state(module, (primary, meta)), {role: guard.state_dict() for role, guard in module.guards.items()}


def on_rank(rank: int, folder: str) -> None:
    found: dict[str, Any] = {}
    for cut in ("global", "local"):
        found[f"{cut}, without"] = trained(ProcessGroup.default(), [0, 1, 2, 4, 5], cut)
        for what in ("activations", "gradient", "loss"):
            found[f"{cut}, {what}"] = trained(ProcessGroup.default(), [0, 1, 2, 3, 4, 5], cut, bad=3, what=what)
    sent = {}
    for mode in ("stop", "skip"):
        counting = replace(ProcessGroup.default(), bytes_sent=[])
        trained(counting, [0, 1, 2, 3], "global", mode=mode)
        sent[mode] = counting.bytes_sent
    under = {mode: under_a_trainer(rank, Path(folder) / mode, mode) for mode in ("stop", "skip")}
    torch.save({**found, "sent": sent, "under": under}, f"{folder}/{rank}.pt")


def under_a_trainer(rank: int, folder: Path, mode: str) -> dict[str, Any]:
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
        return {"said": str(error)}
    return {"state": everything(module, trainer), "skipped": trainer.callback_metrics["train/skipped"]}


def test_all_ranks_skip_a_step_that_is_not_finite_on_one(tmp_path: Path):
    in_process_group(2, on_rank, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    for rank, found in enumerate((one["under"]["stop"], other["under"]["stop"])):
        broken = "the primary's loss" if rank else r"(the primary's loss|primary\.sae\.\w+)"
        assert re.match(
            f"{broken} is not finite after 640 tokens; no checkpoint .* is {tmp_path}/stop/checkpoints/tokens=512.ckpt", found["said"]
        )
    good, damaged = newest_intact([tmp_path / "stop" / "checkpoints"])
    assert good is not None and good.name == "tokens=512.ckpt" and not damaged
    last = torch.load(good, weights_only=False)["state_dict"]
    assert first_nonfinite(last) is None and int(last["primary.steps"]) == 4
    found, others = one["under"]["skip"], other["under"]["skip"]
    assert not differing(found["state"], others["state"]) and first_nonfinite(found["state"]) is None
    assert found["skipped"] == others["skipped"] == 2 and int(found["state"]["primary.steps"]) == 6
    # Between the checkpoints around a skipped step, only the number of rows has changed.
    before, after = (torch.load(tmp_path / "skip" / "checkpoints" / f"tokens={tokens}.ckpt", weights_only=False) for tokens in (768, 896))
    assert differing(before["state_dict"], after["state_dict"]) == ["primary.rows_seen"]
    assert not differing(moments(before["optimizer_states"]), moments(after["optimizer_states"]))
    assert before["lr_schedulers"] == after["lr_schedulers"]
    for cut in ("global", "local"):
        for what in ("activations", "gradient", "loss"):
            (state, counts), (others, their_counts), (without, _) = one[f"{cut}, {what}"], other[f"{cut}, {what}"], one[f"{cut}, without"]
            assert not differing(state, others) and not differing(state, without), (cut, what)
            assert counts == their_counts == {"primary": {"total": 1, "in_a_row": 0}, "meta": {"total": 0, "in_a_row": 0}}
    # The guard sends eight bytes per step, for four primary and four meta steps, and nothing else.
    assert len(one["sent"]["skip"]) == len(one["sent"]["stop"]) + 8 and sum(one["sent"]["skip"]) == sum(one["sent"]["stop"]) + 64


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

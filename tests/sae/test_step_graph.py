"""Steps whose gradient a CUDA graph computes. On a CPU a tape of torch's calls stands for the graph: numbers and memory are those of the
recording, as they are in a graph."""

import copy
import warnings
from collections.abc import Generator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR

from metasae_lightning.callbacks import StopOnNaN
from metasae_lightning.compute import row_passes
from metasae_lightning.compute.gpu import encoder, passes, topk
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.penalties import Decomposability, Orthogonality, Penalty
from metasae_lightning.sae import forward, step_graph
from metasae_lightning.sae.gpu_layout import store_encoder_for_device
from metasae_lightning.sae.recording import Recording
from metasae_lightning.step import Batch, StepOutput
from metasae_lightning.training import step_memory
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.side_by_side import SideBySide
from tests.helpers.architectures import Batches, activations, config
from tests.helpers.tape import as_kernel, tape

STEPS = 24


@as_kernel
def compact(products: Tensor, bias: Tensor, scale: Tensor | None, cut: Tensor, keys: Tensor, n_above: Tensor, first_row: int) -> None:
    """The kernel that finds candidates, by torch's functions."""
    values = (products + bias) * (1 if scale is None else scale)
    places = (values > cut).flatten().nonzero().flatten()
    found = values.flatten()[places].view(torch.int32).long() << 32 | (topk.LAST_PLACE - places - first_row * values.shape[1])
    kept = found[: len(keys)]
    keys[: len(kept)] = kept
    n_above += len(found)


@pytest.fixture(autouse=True)
def gpu_path(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """The GPU's path on a CPU, with a tape for the graph."""
    kernels = SimpleNamespace(compact=compact)
    for module in (encoder, topk, step_graph):
        monkeypatch.setattr(module, "triton_kernels", lambda tensor: kernels if tensor.dtype == torch.float32 else None)
    for module in (passes, row_passes):
        monkeypatch.setattr(module, "triton_kernels", lambda tensor: None)
    monkeypatch.setattr(step_graph, "cuda_graph", tape)
    with dry_run_scale(1.0, gpu=True):
        yield


def joint(name: str = "batchtopk", penalties: dict[str, Penalty] | None = None, **settings: Any) -> JointSAE:
    options = {"apply_b_dec_to_input": True, "normalize_activations": "layer_norm"}
    made = {"p": Decomposability(0.3, warm_up_steps=3)} if penalties is None else penalties
    meta = config("batchtopk", 12, **options) if any(penalty.needs_critic for penalty in made.values()) else None
    settings = {"n_p": 2, "n_m": 2, "dead_after_tokens": 10**6, "meta_dead_after_steps": 10**4, **settings}
    return JointSAE(config(name, **options), meta, made, **settings)


def run(module: JointSAE, steps: int = STEPS, rows: int = 32) -> list[dict[str, float]]:
    """Train, with a schedule of the learning rate; returns the logged figures of each step."""
    learners = [learner for learner in (module.primary, module.meta) if learner is not None]
    for learner in learners:
        store_encoder_for_device(learner.sae)
    optimizers = [Adam(learner.parameters(), lr=1e-2, fused=True) for learner in learners]
    schedule = ExponentialLR(optimizers[0], 0.9)
    figures: list[dict[str, float]] = []
    for step in range(steps):
        output = module.step(Batch(activations(step, rows)), *optimizers, last=step == steps - 1)
        scalars = {"sum": float(output.codes.values.sum()), "error": float(output.reconstruction.sum()), **output.scalars()}
        figures.append({key: float(value) for key, value in scalars.items()})
        schedule.step()
    return figures


def replayed(module: JointSAE) -> list[int]:
    """Number of replayed steps of the primary and the meta SAE."""
    return [learner.step_graph.replayed for learner in (module.primary, module.meta) if learner is not None and learner.step_graph]


def assert_same_run(with_graph: JointSAE, without: JointSAE) -> None:
    """Both runs log the same figures and end with the same bits."""
    assert run(with_graph) == run(without) and not replayed(without)
    assert with_graph.state_dict().keys() == without.state_dict().keys()
    for key, value in without.state_dict().items():
        assert torch.equal(with_graph.state_dict()[key], value), key


SETTINGS = [{}, {"clip_grad_norm": 0.1}, {"non_finite": "skip"}, {"meta_rows": 20}, {"decoder_rows": "free"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_joint_run_by_graph_has_the_bits_of_one_without(settings: dict[str, Any]):
    module = joint(**settings)
    assert_same_run(module, joint(**settings, cuda_graph=False))
    assert all(count > 10 for count in replayed(module))


def test_while_a_penaltys_weight_rises_steps_are_computed_without_a_graph():
    penalties: list[dict[str, Penalty]] = [{"p": Decomposability(0.3, warm_up_steps=12)} for _ in range(2)]
    module = joint(penalties=penalties[0])
    assert_same_run(module, joint(penalties=penalties[1], cuda_graph=False))
    assert 0 < replayed(module)[0] <= STEPS - 12 - step_graph.STEPS_BEFORE


@pytest.mark.parametrize("name", ["topk", "matryoshka_batchtopk"])
def test_other_architectures_by_graph_have_the_bits_of_those_without(name: str):
    module = joint(name)
    assert_same_run(module, joint(name, cuda_graph=False))
    assert all(count > 10 for count in replayed(module))


def test_a_run_in_which_latents_die_has_the_same_bits_and_is_recorded_again(monkeypatch: pytest.MonkeyPatch):
    """The padding of the dead latents changes with their number; steps with another padding are computed without the graph."""
    monkeypatch.setattr(step_graph, "STEPS_BEFORE", 1)
    for owner in (encoder, forward):
        monkeypatch.setattr(owner, "LEAST_PADDED", 2)
    module = joint(dead_after_tokens=64, penalties={})
    paddings = set[int]()
    graph = module.primary.step_graph
    assert graph is not None
    surroundings = graph._surroundings  # pyright: ignore[reportPrivateUsage]

    def seen(x: Tensor) -> tuple[Any, ...]:
        paddings.add(module.primary.forward_pass.padded_dead)  # pyright: ignore
        return surroundings(x)

    graph._surroundings = seen  # type: ignore[method-assign]
    assert_same_run(module, joint(dead_after_tokens=64, penalties={}, cuda_graph=False))
    assert len(paddings) > 1 and max(paddings) > 2 and replayed(module)[0] > 3


def test_a_search_that_fails_is_made_again_without_the_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder, "BATCH_ROOM", 3)
    module = joint()
    assert_same_run(module, joint(cuda_graph=False))
    assert 0 < replayed(module)[0] < STEPS - 7


@pytest.mark.parametrize("kind", ["SGD that keeps gradients", "k that changes"])
def test_other_state_of_a_step_than_weights_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch):
    """An optimiser whose `zero_grad` keeps the gradient keeps the recording's, which a failed replay overwrites."""
    monkeypatch.setattr(encoder, "BATCH_ROOM", 3 if "SGD" in kind else 6)
    found: list[list[Tensor]] = []
    for module in (joint(penalties={}), joint(penalties={}, cuda_graph=False)):
        store_encoder_for_device(module.primary.sae)
        optimizer = SGD(module.primary.parameters(), lr=1e-2)
        if "SGD" in kind:
            optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)  # type: ignore[method-assign]
        losses: list[Tensor] = []
        for step in range(16):
            if step == 12 and "k" in kind.split():
                module.primary.sae.cfg.k = 2
            losses.append(module.step(Batch(activations(step, 32)), optimizer).loss)
        found.append(losses)
        assert (sum(replayed(module)) > 0) == (len(found) == 1)
    assert found[0] == found[1]


def test_a_recording_whose_replays_keep_failing_is_given_up(monkeypatch: pytest.MonkeyPatch):
    module = joint(penalties={})
    store_encoder_for_device(module.primary.sae)
    optimizer, graph = Adam(module.primary.parameters()), module.primary.step_graph
    assert graph is not None
    tries = list[int]()
    monkeypatch.setattr(Recording, "replay", lambda self, x: tries.append(len(x)))
    for step in range(4 + 3 + 5):
        module.step(Batch(activations(step, 32)), optimizer)
    assert len(tries) == step_graph.FAILURES and graph._recording is None  # pyright: ignore[reportPrivateUsage]


class Drifting(Penalty):
    """A penalty that depends on the step, although it says that it does not."""

    uses_step = False

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        """The squared first column, times the number of the step."""
        return W_dec[:, 0].square().mean() * (1 + step)


def test_a_graph_that_differs_from_a_step_without_it_is_not_used():
    module, without = joint(penalties={"p": Drifting(0.3)}), joint(penalties={"p": Drifting(0.3)}, cuda_graph=False)
    with pytest.warns(UserWarning, match="a step by CUDA graph differs from one without"):
        assert_same_run(module, without)
    assert replayed(module) == [0]


def test_a_step_that_cannot_be_recorded_goes_on_without_a_graph(monkeypatch: pytest.MonkeyPatch):
    def fails(step: Any) -> Any:
        tape(step)
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(step_graph, "cuda_graph", fails)
    module = joint()
    with pytest.warns(UserWarning, match=r"cannot be recorded as a CUDA graph \(operation not permitted when stream is capturing\)"):
        assert_same_run(module, joint(cuda_graph=False))
    assert replayed(module) == [0, 0]


@pytest.mark.parametrize(
    ("penalty", "settings"),
    [
        (Orthogonality(0.1, chunk_size=16), {}),
        (Decomposability(0.3, rows=0.5), {}),
        (Decomposability(0.3), {"critic_supports": "macro_step"}),
        (Decomposability(0.3), {"micro_batches": 2}),
    ],
)
def test_steps_that_differ_from_one_to_the_next_are_not_recorded(penalty: Penalty, settings: dict[str, Any]):
    module = joint(penalties={"p": penalty}, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(module, 14)
    assert module.primary.step_graph is None or not module.primary.step_graph.replayed


def test_weights_that_have_moved_are_recorded_again():
    module, without = joint(), joint(cuda_graph=False)
    for each in (module, without):
        run(each, 10)
        each.primary.sae.W_dec.data = each.primary.sae.W_dec.data.clone()
    before = replayed(module)[0]
    assert run(module, 20) == run(without, 20) and replayed(module)[0] > before


def test_another_batch_size_is_computed_without_the_graph():
    module, without = joint(), joint(cuda_graph=False)
    figures = [run(each, 14) + run(each, 3, rows=24) for each in (module, without)]
    assert figures[0] == figures[1] and replayed(module)[0] > 0
    for key, value in without.state_dict().items():
        assert torch.equal(module.state_dict()[key], value), key


def test_a_reconstruction_that_a_later_step_has_overwritten_is_an_error_and_codes_and_losses_are_kept():
    module, without = joint(penalties={}), joint(penalties={}, cuda_graph=False)
    found: list[list[StepOutput]] = []
    for each in (module, without):
        optimizer = Adam(each.primary.parameters())
        store_encoder_for_device(each.primary.sae)
        found.append([each.step(Batch(activations(step, 32)), optimizer) for step in range(12)])
    outputs, expected = found
    assert replayed(module)[0] > 2
    for output, other in zip(outputs, expected, strict=True):
        assert torch.equal(output.codes.values, other.codes.values) and torch.equal(output.codes.latents, other.codes.latents)
        assert torch.equal(output.codes.rows, other.codes.rows) and torch.equal(output.loss, other.loss)
    assert outputs[-1].reconstruction.isfinite().all()
    with pytest.raises(RuntimeError, match="overwritten by a later step"):
        _ = outputs[-2].reconstruction


def test_a_copy_of_a_learner_has_a_graph_of_its_own():
    module = joint()
    run(module, 14)
    copied = copy.deepcopy(module)
    assert copied.primary.step_graph is not None and module.primary.step_graph is not None
    assert copied.primary.step_graph.learners == [copied.primary, copied.meta]
    assert copied.primary.step_graph.replayed == 0 < module.primary.step_graph.replayed


class Observer(Callback):
    """A callback with a hook for the backward pass."""

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Do nothing."""


@pytest.mark.parametrize("callback", [Callback(), Observer()])
def test_a_callback_with_a_hook_for_the_backward_pass_switches_graphs_off(callback: Callback, tmp_path: Path):
    """A replay would not call it."""
    module = joint()
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    step_memory.leave_out_graphs(module, Trainer(callbacks=[callback], **options))
    assert [learner.step_graph is None for learner in (module.primary, module.meta) if learner] == [isinstance(callback, Observer)] * 2


def test_recorded_steps_are_freed_after_training():
    module = joint()
    run(module, 14)
    graphs = [learner.step_graph for learner in (module.primary, module.meta) if learner is not None]
    assert all(graph is not None and graph._recording is not None for graph in graphs)  # pyright: ignore[reportPrivateUsage]
    module.teardown("fit")
    assert all(graph is not None and graph._recording is None for graph in graphs)  # pyright: ignore[reportPrivateUsage]


def test_lightning_trains_arms_by_graph_to_the_same_bits(tmp_path: Path):
    """Each arm has its own graph; Lightning counts every optimiser's step."""
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    found: list[tuple[int, dict[str, Tensor]]] = []
    for cuda_graph in (True, False):
        arms = {"solo": joint(penalties={}, cuda_graph=cuda_graph), "joint": joint(cuda_graph=cuda_graph)}
        observers = [StopOnNaN()]
        trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, enable_model_summary=False, callbacks=observers, **options)
        trainer.fit(SideBySide(arms), train_dataloaders=Batches(20))
        found.append(
            (trainer.global_step, {f"{name}.{key}": value for name, arm in arms.items() for key, value in arm.state_dict().items()})
        )
        assert [min(replayed(arm), default=0) > 0 for arm in arms.values()] == [cuda_graph] * 2
    (steps, by_graph), (steps_without, without) = found
    assert steps == steps_without == 20 + 20 + 20
    for key, value in without.items():
        assert torch.equal(by_graph[key], value), key

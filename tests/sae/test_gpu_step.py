"""A training step's GPU path, chosen by hand on CPU tensors: shapes without data, few calls, and the results of the CPU's path."""

from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

from metasae_lightning.compute import row_passes
from metasae_lightning.compute.gpu import encoder, passes, topk
from metasae_lightning.compute.gpu.host_reads import deferred_checks, given_numbers
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.metrics import decomposition
from metasae_lightning.penalties import Decomposability, Orthogonality, Penalty
from metasae_lightning.sae.gpu_layout import match_parameters, store_encoder_for_device
from metasae_lightning.sae.graphed_learner import GraphedLearner
from metasae_lightning.sae.learner import Learner, LearnerConfig
from metasae_lightning.step import Batch
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.optimizers import adam
from tests.helpers.architectures import activations, config

# Calls that start no kernel: views, allocations, and what fake tensors and profiling add.
WITHOUT_KERNEL = {
    *("view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "expand", "permute", "unbind", "split"),
    *("_unsafe_view", "as_strided", "empty", "new_empty", "empty_like", "device", "_record_function_enter_new", "_record_function_exit"),
}
# Calls for which the host waits for a GPU, and `lift_fresh`, which begins a copy of Python numbers to it.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "lift_fresh", "_unique2", "bincount"}
# A read of the threshold, of how much it exceeds what was not ranked, and of the number of dead latents.
CERTAIN = [1.0, 0.5, 0.0]
SIZES = [(4608, 1024), (65536, 8192)]


class CallCounter(TorchDispatchMode):
    """Counts torch's calls by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """Number of calls that start a kernel on a GPU."""
        return sum(count for name, count in self.calls.items() if name not in WITHOUT_KERNEL)


def joint(d_sae: int, *, k: int = 32, per_row: bool = False, penalty: Penalty | None = None, d_in: int = 64, **settings: Any) -> JointSAE:
    """The author's settings at another size; solo without a penalty."""
    shared: dict[str, Any] = {"normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": False, "decoder_init_norm": 1.0}
    primary = (TopKTrainingSAEConfig if per_row else BatchTopKTrainingSAEConfig)(d_in=d_in, d_sae=d_sae, k=k, **shared)
    meta = BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae // 8, k=4, **shared) if penalty is not None else None
    return JointSAE(primary, meta, {} if penalty is None else {"p": penalty}, b_dec_init="zeros", **settings)


def fake_step(module: JointSAE, batch: int, reads: list[list[float]]) -> tuple[CallCounter, CallCounter | None]:
    """The calls of a joint step and of a meta step in their steady state, on tensors without data."""
    learners = [learner for learner in (module.primary, module.meta) if learner is not None]
    for learner in learners:
        learner.initialized, learner.steps = True, 1
        store_encoder_for_device(learner.sae)
    optimizers = [adam(learner.parameters()) for learner in learners]
    counters = []
    for _ in range(2):  # the first step makes the optimiser's state
        x, answers = torch.randn(batch, 64), iter(reads)
        with CallCounter() as step, given_numbers(answers):
            module.step(Batch(x), *optimizers)
        assert not list(answers)
        if module.meta is not None:
            rows = torch.nn.functional.normalize(module.primary.W_dec.detach(), dim=-1)
            with CallCounter() as meta, given_numbers([CERTAIN]):
                module.meta.learn(rows, optimizers[1], backward=Tensor.backward)
            counters = [step, meta]
        else:
            counters = [step, None]
    return tuple(counters)  # type: ignore[return-value]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("is_joint", [False, True])
def test_a_step_has_static_shapes_one_wait_and_a_number_of_calls_that_does_not_grow(is_joint: bool, per_row: bool, bf16: bool):
    found: list[tuple[int, int | None]] = []
    for d_sae, batch in SIZES:
        with FakeTensorMode(), dry_run_scale(1.0, gpu=True), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            module = joint(d_sae, per_row=per_row, penalty=Decomposability(0.3) if is_joint else None)
            # The critic's check is read together with the primary's.
            step, meta = fake_step(module, batch, [CERTAIN + CERTAIN[:2] if is_joint else CERTAIN])
        for counter in filter(None, (step, meta)):
            assert not WAITS & counter.calls.keys()
        found.append((step.kernels, None if meta is None else meta.kernels))
    assert found[0] == found[1]
    assert found[0][0] <= (110 if is_joint else 60)
    assert found[0][1] is None or found[0][1] <= 60


def test_a_step_with_dead_latents_waits_once_more_at_most():
    """The number of dead latents is read with the check, so their activations have a known shape."""
    with FakeTensorMode(), dry_run_scale(1.0, gpu=True):
        step, _ = fake_step(joint(4608), 1024, [[1.0, 0.5, 100.0]])
    assert not WAITS & step.calls.keys() and step.calls["nonzero_static"] == 1


def test_an_evaluation_batch_waits_once():
    with FakeTensorMode(), dry_run_scale(1.0, gpu=True):
        module = joint(4608)
        with CallCounter() as counter, given_numbers([CERTAIN[:2]]):
            module.evaluate(Batch(torch.randn(1024, 64)))
    assert not WAITS & counter.calls.keys() and counter.kernels < 30


@pytest.mark.parametrize("penalty", [Orthogonality(chunk_size=512), Decomposability(0.3, rows=0.125)])
def test_a_penaltys_calls_do_not_grow_with_the_number_of_latents(penalty: Penalty):
    counts: list[int] = []
    for d_sae in (1024, 8192):
        with FakeTensorMode(), dry_run_scale(1.0, gpu=True):
            reads = [CERTAIN + ([] if isinstance(penalty, Orthogonality) else CERTAIN[:2])]
            step, _ = fake_step(joint(d_sae, k=4, penalty=penalty), 256, reads)
        assert not WAITS & step.calls.keys()
        counts.append(step.kernels)
    assert counts[0] == counts[1]


# Torch's meta device stands for the GPU: an operation on a tensor of it and one of the CPU is an error, as it is with a GPU.
@pytest.mark.parametrize("n_dead", [0.0, 100.0])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rows", [1.0, 0.25])
def test_all_tensors_of_a_step_are_on_the_modules_device(rows: float, name: str, n_dead: float, monkeypatch: pytest.MonkeyPatch):
    autocast, no_autocast = torch.autocast, nullcontext()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": False)
    monkeypatch.setattr(torch, "autocast", lambda device, *args, **kw: no_autocast if device == "meta" else autocast(device, *args, **kw))
    penalties = {"d": Decomposability(0.3, rows=rows), "o": Orthogonality(0.1, chunk_size=16)}
    module = JointSAE(config(name, d_sae=200), config("batchtopk", d_sae=12), penalties, n_p=1, n_m=2, non_finite="stop").to("meta")
    learners = [learner for learner in (module.primary, module.meta) if learner is not None]
    for learner in learners:
        learner.initialized, learner.steps = True, 1
    module_optimizers = [Adam(learner.parameters(), foreach=True) for learner in learners]
    certain = [1.0, 0.5, n_dead]
    with given_numbers([[*certain, 1.0, 0.5], CERTAIN, CERTAIN, [1.0, 0.5]]):
        output = module.step(Batch(torch.randn(64, 16, device="meta")), *module_optimizers)
        evaluation = module.evaluate(Batch(torch.randn(64, 16, device="meta")))
    figures = [value for value in output.scalars().values() if isinstance(value, Tensor)]
    assert len(figures) > 8 and all(figure.is_meta for figure in [*figures, output.reconstruction, evaluation.reconstruction])
    with pytest.raises(RuntimeError, match="device"):  # the control
        module.evaluate(Batch(torch.randn(64, 16)))


def trained(module: JointSAE, *, gpu: bool, steps: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The state after some joint steps on the CPU's path or the GPU's."""
    module.to(dtype)
    with dry_run_scale(1.0, gpu=gpu):
        for learner in (module.primary, module.meta):
            if learner is not None:
                store_encoder_for_device(learner.sae)
        optimizers = [adam(learner.parameters()) for learner in (module.primary, module.meta) if learner is not None]
        for step in range(steps):
            module.step(Batch(activations(step, 64).to(dtype)), *optimizers, last=step == steps - 1)
    return module.state_dict()


def small_joint(name: str, **settings: Any) -> JointSAE:
    options = {"apply_b_dec_to_input": True, "normalize_activations": "layer_norm"}
    meta = config("batchtopk", 12, **options)
    penalties = {"p": Decomposability(0.3), "o": Orthogonality(0.1, chunk_size=16)}
    return JointSAE(config(name, **options), meta, penalties, n_p=2, n_m=2, dead_after_tokens=100, **settings)


SETTINGS = [{}, {"micro_batches": 3}, {"clip_grad_norm": 0.1}, {"non_finite": "skip"}, {"meta_rows": 20}, {"critic_supports": "macro_step"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_a_run_on_the_gpu_path_equals_one_on_the_cpu_path(name: str, settings: dict[str, Any]):
    assert_same_run(name, **settings)


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_without_room_for_candidates_all_values_are_ranked_and_the_run_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(encoder, "BATCH_ROOM", 1)
    monkeypatch.setattr(encoder, "ROW_ROOM", 1)
    searches = list[int]()
    exact = topk.exact_largest
    monkeypatch.setattr(encoder, "exact_largest", lambda values, count: (searches.append(count), exact(values, count))[1])
    assert_same_run(name)
    assert len(searches) >= 2 * 12  # twice for each of the critic's searches, at least


def assert_same_run(name: str, **settings: Any) -> None:
    """Weights and statistics after a run on either path are equal in float64."""
    on_cpu, on_gpu = (trained(small_joint(name, **settings), gpu=gpu, dtype=torch.float64) for gpu in (False, True))
    assert on_cpu.keys() == on_gpu.keys()
    for key, value in on_cpu.items():
        torch.testing.assert_close(on_gpu[key].double(), value.double(), rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    assert on_gpu["primary.sae.W_enc"].stride() == (1, 16)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Triton's kernels for CPU tensors, by Triton's interpreter; the list counts the passes of the kernel that finds candidates."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are compiled, and take no CPU tensors")
    kernels, passes_made = passes._kernels(), list[int]()  # pyright: ignore[reportPrivateUsage]
    for module in (passes, encoder, topk, row_passes):
        monkeypatch.setattr(module, "triton_kernels", lambda tensor: kernels if tensor.dtype == torch.float32 else None)
    compact = kernels.compact  # type: ignore[union-attr]
    monkeypatch.setattr(kernels, "compact", lambda *args: (passes_made.append(args[6]), compact(*args)))
    return passes_made


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_a_run_with_kernels_equals_one_with_torchs_functions(name: str, interpreted: list[int]):
    with_kernels = trained(small_joint(name), gpu=True)
    assert len(interpreted) > (8 if name == "batchtopk" else 4)
    with pytest.MonkeyPatch.context() as without:
        for module in (passes, encoder, topk, row_passes):
            without.setattr(module, "triton_kernels", lambda tensor: None)
        with_torch = trained(small_joint(name), gpu=True)
    for key, value in with_torch.items():
        if value.is_floating_point():
            torch.testing.assert_close(with_kernels[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_a_cpus_optimiser_state_goes_on_with_an_encoder_stored_by_latent():
    """The control: without `match_parameters` the moments lie in another order than the weights."""
    uninterrupted = trained(small_joint("batchtopk"), gpu=False, dtype=torch.float64)
    first, second = small_joint("batchtopk").double(), small_joint("batchtopk").double()

    def steps(module: JointSAE, numbers: range, states: list[Any] | None = None) -> list[Any]:
        optimizers = [adam(learner.parameters()) for learner in (module.primary, module.meta) if learner is not None]
        for optimizer, state in zip(optimizers, states or [], strict=False):
            optimizer.load_state_dict(state)
            moments = optimizer.state[module.primary.sae.W_enc] if optimizer is optimizers[0] else {}
            assert not moments or moments["exp_avg"].stride() != module.primary.sae.W_enc.stride()
            match_parameters(optimizer)
            assert not moments or optimizer.state[module.primary.sae.W_enc]["exp_avg"].stride() == module.primary.sae.W_enc.stride()
        for step in numbers:
            module.step(Batch(activations(step, 64).double()), *optimizers, last=step == 5)
        return [optimizer.state_dict() for optimizer in optimizers]

    states = steps(first, range(3))
    second.load_state_dict(first.state_dict())
    with dry_run_scale(1.0, gpu=True):
        for learner in (second.primary, second.meta):
            store_encoder_for_device(learner.sae)  # type: ignore[union-attr]
        steps(second, range(3, 6), states)
    for key, value in uninterrupted.items():
        torch.testing.assert_close(second.state_dict()[key].double(), value.double(), rtol=1e-9, atol=1e-9, msg=key)


def test_a_search_that_finds_too_little_selects_places_of_the_batch(interpreted: list[int]):
    """Where the check is deferred, kernels read the selected rows before the host knows that they are the wrong ones."""
    x, W_enc, b_enc = activations(0, 32), torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(24)
    with dry_run_scale(1.0, gpu=True), deferred_checks() as checks:
        search = encoder.GpuEncoder(x, W_enc, b_enc, None, None, Parallelism())
        found = search.top_k(4, per_row=False, hint=(x @ W_enc).max() / 1.01)
    assert interpreted and not checks.all_hold() and len(found.rows) == 4 * 32
    assert found.rows.max() < 32 and found.columns.max() < 24 and (found.rows.diff() >= 0).all()


def test_a_batch_with_more_values_than_can_be_counted_is_ranked_without_keys(interpreted: list[int], monkeypatch: pytest.MonkeyPatch):
    x, W_enc, b_enc = activations(0, 32), torch.randn(16, 24, generator=torch.Generator().manual_seed(0)), torch.zeros(24)
    with dry_run_scale(1.0, gpu=True):
        search = encoder.GpuEncoder(x, W_enc, b_enc, None, None, Parallelism())
        by_keys = search.top_k(4, per_row=False, hint=torch.tensor(0.5))
        n_passes = len(interpreted)
        monkeypatch.setattr(encoder, "MOST_VALUES", 32 * 24)
        without_keys = search.top_k(4, per_row=False, hint=torch.tensor(0.5))
    assert n_passes == len(interpreted) == 1
    assert torch.equal(by_keys.columns, without_keys.columns) and torch.equal(by_keys.rows, without_keys.rows)


def test_where_triton_starts_no_kernel_torchs_functions_are_used(monkeypatch: pytest.MonkeyPatch):
    """Triton is installed with torch, and needs a C compiler."""
    with FakeTensorMode():
        tensor = torch.empty(1, device="cuda:0")
    kernels = SimpleNamespace(unit_rows=lambda *_: (_ for _ in ()).throw(RuntimeError("Failed to find\nC compiler")))
    monkeypatch.setattr(passes, "_kernels", lambda: kernels)
    monkeypatch.setattr(passes, "_starts_on", starts_on := passes._starts_on.__wrapped__)  # pyright: ignore[reportPrivateUsage]
    with pytest.warns(UserWarning, match=r"starts no kernel on cpu \(Failed to find C compiler\)"):
        assert not starts_on(torch.device("cpu"))
    with pytest.warns(UserWarning, match="starts no kernel on cuda:0"):
        assert passes.triton_kernels(tensor) is None
    kernels.unit_rows = lambda *_: None
    assert starts_on(torch.device("cpu"))


@pytest.mark.parametrize("room", [6, 2, 1])
def test_a_graphed_step_equals_a_step_and_one_that_fails_is_taken_again(room: int, monkeypatch: pytest.MonkeyPatch, interpreted: list[int]):
    """The graph is replaced by the function that it would record. With little room some or all searches fail."""
    assert not interpreted
    monkeypatch.setattr(encoder, "BATCH_ROOM", room)
    for module in (passes, row_passes):  # only the kernel that finds candidates is needed here, and the interpreter is slow
        monkeypatch.setattr(module, "triton_kernels", lambda tensor: None)

    def learner() -> tuple[Learner, Adam]:
        made = Learner(config("batchtopk"), LearnerConfig(dead_after=10**6, clip_grad_norm=0.5), role="critic", seed=0)
        made.initialize(activations(0))
        return made, Adam(made.parameters(), lr=1e-3, fused=True)

    with dry_run_scale(1.0, gpu=True):
        (plain, plain_optimizer), (graphed, graphed_optimizer) = learner(), learner()
        steps = GraphedLearner(graphed, graphed_optimizer, capture=lambda step: step)
        for step in range(10):
            plain.learn(activations(step), plain_optimizer, backward=Tensor.backward)
            steps.learn(activations(step))
    assert steps.retaken == 0 if room == 6 else steps.retaken > 0
    assert plain.state_dict().keys() == graphed.state_dict().keys()
    for key, value in plain.state_dict().items():
        assert torch.equal(graphed.state_dict()[key], value), key
    moments = zip(plain_optimizer.state.values(), graphed_optimizer.state.values(), strict=True)
    assert all(torch.equal(a[name], b[name]) for a, b in moments for name in ("step", "exp_avg", "exp_avg_sq"))


def test_counts_above_two_to_the_24th_are_read_exactly():
    """float32 has no such odd numbers; one number in float64 makes all of them float64."""
    x, W_enc, extra = torch.ones(2, 3), torch.ones(3, 4), torch.tensor([True, False, True, False])
    with dry_run_scale(1.0, gpu=True):
        search = encoder.GpuEncoder(x, W_enc, torch.zeros(4), None, extra, Parallelism())
        assert search._read(torch.tensor(0.5), torch.tensor(2**24 + 1)) == [0.5, 2**24 + 1]  # pyright: ignore[reportPrivateUsage]
    assert search.extra_latents.tolist() == [0, 2] and search.extra_pre_acts.tolist() == [[3.0, 3.0]] * 2


@pytest.mark.parametrize("is_on", [True, False])
def test_critics_are_graphed_where_they_can_be_unless_that_is_switched_off(is_on: bool, monkeypatch: pytest.MonkeyPatch):
    batches = list[int]()
    graphed = SimpleNamespace(learn=lambda x: batches.append(len(x)))
    monkeypatch.setattr(decomposition, "can_be_graphed", lambda critic, rows: True)
    monkeypatch.setattr(decomposition, "GraphedLearner", lambda critic, optimizer: graphed)
    metric = decomposition.Decomposition(seeds=1, steps=7, batch_size=8, cuda_graph=is_on)
    metric.variance_explained(torch.nn.functional.normalize(torch.randn(40, 6), dim=-1), seed=0)
    assert batches == ([8] * 7 if is_on else [])

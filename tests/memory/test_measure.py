"""Counted bytes are the bytes that a process holds: for a block, a language model's forward pass and a training step."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam

from metasae_lightning.compute import topk
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, LanguageModel, TransformerLensLM
from metasae_lightning.memory import measure
from metasae_lightning.memory.measure import AllocationTracker, PeakMemory
from metasae_lightning.penalties import Decomposability, Orthogonality
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import ARCHITECTURES, config
from tests.helpers.models import save_model


# 1000 float32 are 4000 bytes. x and y are one storage and z another; z dies last. Of the three, only z's successor of 400 bytes is small.
def test_a_storage_counts_while_it_lives():
    def act() -> None:
        x = torch.zeros(1000)
        y = x.view(10, 100)
        z = y * 2
        del x, y
        z = z[0] + 1
        del z

    tracker = AllocationTracker(large_block=500)
    assert tracker.peak_of(act) == PeakMemory(8000, 400)
    assert tracker.peak_of(act) == PeakMemory(8000, 400)


def test_a_view_of_an_older_tensor_adds_no_bytes():
    weight = torch.zeros(10, 100)
    assert AllocationTracker().peak_of(lambda: weight.t()[:, None]) == PeakMemory(0, 0)
    assert AllocationTracker().peak_of(lambda: weight.t().contiguous()) == PeakMemory(4000, 4000)


# 16 bytes an entry of scratch, and afterwards what is returned: 8 values of 4 and 8 indices of 8 bytes, which are there at the same time.
def test_a_sort_counts_the_copy_it_makes():
    x = torch.randn(1000)
    assert AllocationTracker().peak_of(lambda: x.topk(8)) == PeakMemory(16 * 1000 + 8 * 12, 16 * 1000 + 8 * 12)


# 1000 entries of a byte become 4000 bytes beside the 4000 of the product.
def test_arithmetic_on_two_types_counts_the_copy_it_makes():
    x = torch.randn(1000)
    mask = x > 0
    assert AllocationTracker().peak_of(lambda: x * mask) == PeakMemory(8000, 8000)
    assert AllocationTracker().peak_of(lambda: x * x) == PeakMemory(4000, 4000)


def loaded_bytes(model: LanguageModel) -> int:
    return measure.module_bytes(model._loaded_root())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("backend", "architecture"),
    [(HuggingFaceLM, "gpt2"), (HuggingFaceLM, "llama"), (HuggingFaceLM, "gemma2"), (TransformerLensLM, "gpt2")],
)
def test_a_model_without_weights_is_measured_as_the_loaded_one(backend: Any, architecture: str, apart: bool, tmp_path: Path):
    model = backend(str(save_model(tmp_path / "model", architecture)), "blocks.1.hook_resid_post")
    planned = measure.measure_language_model(model, 32, 60, separate_documents=apart)
    assert model._root is None
    model.load()
    assert planned.weights == loaded_bytes(model)
    visible = torch.ones(32, 60, 60, dtype=torch.bool) if apart and backend is HuggingFaceLM else None
    real = AllocationTracker().peak_of(lambda: model.activations(torch.zeros(32, 60, dtype=torch.long), visible))
    # The tokens themselves, and the scratch of the CPU's attention where it is given a mask.
    assert planned.forward.bytes == pytest.approx(real.bytes, rel=0.05)


# GPT-2's head is its embedding: 300 x 32 numbers once, 64 positions, and a layer of 12 * 32^2 weights and 13 * 32 biases and norms.
# The final norm is there too.
@pytest.mark.parametrize(("hook", "layers"), [("blocks.0.hook_resid_post", 1), ("blocks.2.hook_resid_pre", 2), ("transformer.ln_f", 4)])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_only_layers_up_to_the_hook_count(hook: str, layers: int, dtype: str, size: int, tmp_path: Path):
    model = HuggingFaceLM(str(save_model(tmp_path / "model", "gpt2")), hook, dtype=dtype)
    numbers = 300 * 32 + 64 * 32 + layers * (12 * 32**2 + 13 * 32) + 2 * 32
    assert measure.measure_language_model(model, 2, 8).weights == numbers * size


# The longest context that could be tried on a meta device's own attention would hold 2 x 4 x 64 x 64 scores of 4 bytes, 8 times over.
def test_attention_on_the_meta_device_holds_no_matrix_of_scores(tmp_path: Path):
    folder = str(save_model(tmp_path / "model", "llama"))
    wide = measure.measure_language_model(HuggingFaceLM(folder, "blocks.0.hook_resid_post"), 1, 2048).forward.bytes
    assert wide < 4 * 2048 * 2048 * 4


@pytest.mark.parametrize("backend", [HuggingFaceLM, TransformerLensLM])
def test_an_unknown_model_gives_the_same_error_as_loading_it(backend: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines: list[str] = []
    for act in (lambda model: measure.measure_language_model(model, 2, 8), lambda model: model.load()):
        with pytest.raises(InputError) as caught:
            act(backend("nobody/no-such-model", "blocks.0.hook_resid_post"))
        lines.append(str(caught.value))
    assert lines[0] == lines[1]
    assert "nobody/no-such-model" in lines[0]


def joint(name: str = "batchtopk", d_in: int = 128, d_sae: int = 1024, *, meta: bool = True, penalty: Any = None, **kw: Any) -> JointSAE:
    sizes = {"k": 32} if "topk" in name else {}
    primary = config(name, d_sae, d_in=d_in, normalize_activations="layer_norm")
    for key, value in sizes.items():
        setattr(primary, key, value)
    critic = config("batchtopk", d_sae // 8, d_in=d_in, normalize_activations="layer_norm")
    penalty = penalty or (Decomposability(0.3) if meta else None)
    return JointSAE(primary, critic if meta else None, {"p": penalty} if penalty else {}, **kw)


# A dry run is smaller by a factor in every dimension; its bytes times the factor squared are the bytes at full size.
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_dry_run_predicts_the_full_size(name: str, monkeypatch: pytest.MonkeyPatch):
    model = joint(name)
    monkeypatch.setattr(measure, "DRY_RUN_ELEMENTS", 2**15)
    small = measure.measure_training(model, 512)
    monkeypatch.setattr(measure, "DRY_RUN_ELEMENTS", 2**40)
    full = measure.measure_training(model, 512)
    assert small.optimizer == pytest.approx(full.optimizer, rel=0.01) == pytest.approx(2, rel=0.01)
    for phase in ("primary", "meta", "evaluation"):
        assert getattr(small, phase).bytes == pytest.approx(getattr(full, phase).bytes, rel=0.06), phase


# A GPU makes the product of all rows and latents at once, 4 bytes each, and a byte that says what lies above the cut; a CPU makes an
# eighth of these 32 M at a time. Beyond 2^28 numbers a GPU's are cut as well.
def test_a_gpus_step_is_measured_on_the_gpus_code_path(monkeypatch: pytest.MonkeyPatch):
    model = joint(d_in=64, d_sae=8192, meta=False)
    on_cpu, on_gpu = (measure.measure_training(model, 4096, gpu=gpu).evaluation.bytes for gpu in (False, True))
    assert on_gpu - on_cpu == pytest.approx(5 * 4096 * 8192 * 7 / 8, rel=0.1)
    monkeypatch.setattr(topk, "GPU_BLOCK", topk.BLOCK)
    assert measure.measure_training(model, 4096, gpu=True).evaluation.bytes == pytest.approx(on_cpu, rel=0.1)


# Nearly all of a meta step is decoder rows x meta latents; what is not is its weights' gradients.
def test_several_ranks_divide_a_meta_step():
    whole, share = (measure.measure_training(joint(d_sae=8192, d_in=64), 256, gpu=True, ranks=ranks).meta.bytes for ranks in (1, 8))
    assert whole / 8 < share < whole / 5


# Everything here is rows x d_sae, and of a micro-batch nothing of that is left when the next begins.
def test_two_micro_batches_take_half_the_memory():
    whole, halves = (measure.measure_training(joint(d_sae=2048, d_in=32, micro_batches=n, meta=False), 2048).primary.bytes for n in (1, 2))
    assert halves == pytest.approx(whole / 2, rel=0.1)


# A matrix of the first is 64 MiB, of the second 4, and 16 where it is sorted: those of the first go back to the system when freed.
def test_blocks_count_as_small_by_their_size_in_the_full_model():
    large, small = (
        measure.measure_training(joint(d_in=64, d_sae=4096, meta=False, kernels="dense"), rows).evaluation for rows in (4096, 256)
    )
    assert large.small_bytes < large.bytes / 5
    assert small.small_bytes == small.bytes


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [(lambda p: SGD(p, lr=1e-3), 0), (lambda p: SGD(p, lr=1e-3, momentum=0.9), 1), (lambda p: Adam(p, amsgrad=True), 3)],
)
def test_an_optimisers_state_is_measured(optimizer: Any, states: int):
    model = joint(primary_optimizer=optimizer, meta_optimizer=optimizer)
    assert measure.measure_training(model, 256).optimizer == pytest.approx(states, abs=0.01)


# The cosines of a chunk of 512 are a matrix of their own size: at a quarter of it in each direction they must be 128 x 128.
def test_a_penaltys_chunks_shrink_with_the_dry_run(monkeypatch: pytest.MonkeyPatch):
    model, peaks = joint(d_in=128, d_sae=2048, meta=False, penalty=Orthogonality(chunk_size=512)), dict[int, int]()
    for elements in (2**40, 2**14):
        monkeypatch.setattr(measure, "DRY_RUN_ELEMENTS", elements)
        peaks[elements] = measure.measure_training(model, 16).primary.bytes
    assert peaks[2**14] == pytest.approx(peaks[2**40], rel=0.1)


def test_a_dry_run_changes_neither_model_nor_random_state():
    model = joint()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record, state = dict(model.primary.sae.cfg.metadata.items()), torch.random.get_rng_state()
    measure.measure_training(model, 512)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert dict(model.primary.sae.cfg.metadata.items()) == record
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("precision", "times"), [("64-true", 2.0), ("bf16-mixed", 1.0)])
def test_the_precision_changes_the_peak(precision: str, times: float):
    plain, other = (measure.measure_training(joint(kernels="dense"), 512, precision=p) for p in ("32-true", precision))
    assert other.optimizer == pytest.approx(plain.optimizer, rel=0.01)
    if precision == "64-true":
        assert other.primary.bytes == pytest.approx(times * plain.primary.bytes, rel=0.15)
    else:
        assert other.primary.bytes != plain.primary.bytes


# What the system says of a process in which nothing else happens: every matrix of this step is 64 MiB or nothing beside it.
RESIDENT = """
import torch
from torch.optim import Adam
from metasae_lightning.step import Batch
from tests.memory.test_measure import joint, resident

model = joint("{name}", d_in=16, d_sae=4096, meta=False)
optimizer = Adam(model.primary.parameters(), fused=True)
x = torch.randn(4096, 16)
model.step(Batch(x[:64]), optimizer)
model.primary.silent_for.fill_(10**9)
before, _ = resident(reset=True)
model.step(Batch(x), optimizer)
print(resident()[1] - before)
"""


def resident(*, reset: bool = False) -> tuple[int, int]:
    """Bytes that this process holds, and the most it held since the last reset (5: proc(5), clear_refs)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
# Top-k and its kin agree within 2 %; of JumpReLU's ten arrays one stays unseen, inside a kernel. Blocks of 64 KiB go back to the system
# here: whether malloc uses one of 16 MiB again is up to chance, a seventh of batch top-k's step.
@pytest.mark.parametrize(("name", "rel"), [("batchtopk", 0.05), ("topk", 0.05), ("jumprelu", 0.15)])
def test_counted_bytes_are_the_systems_resident_bytes(name: str, rel: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "LARGE_BLOCK", 2**16)
    counted = measure.measure_training(joint(name, d_in=16, d_sae=4096, meta=False), 4096).primary.bytes
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", RESIDENT.format(name=name)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    seen = int(subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True).stdout)
    assert counted == pytest.approx(seen, rel=rel)

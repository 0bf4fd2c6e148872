"""Measured bytes equal those that a process uses: for single operations, a language model's forward pass and a training step."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam

from metasae_lightning.compute import topk
from metasae_lightning.compute.gpu import encoder
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, LanguageModel, TransformerLensLM
from metasae_lightning.memory import measure
from metasae_lightning.memory.measure import AllocationTracker, PeakMemory
from metasae_lightning.penalties import Decomposability, Orthogonality
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import ARCHITECTURES, config
from tests.helpers.models import save_model


# 1000 float32 are 4000 bytes. x and y share a storage, z has its own and is freed last. Only the 400 bytes of `z[0] + 1` are a small block.
def test_a_storage_counts_from_allocation_to_release():
    def allocate_and_free() -> None:
        x = torch.zeros(1000)
        y = x.view(10, 100)
        z = y * 2
        del x, y
        z = z[0] + 1
        del z

    tracker = AllocationTracker(large_block=500)
    assert tracker.peak_of(allocate_and_free) == PeakMemory(8000, 400)
    assert tracker.peak_of(allocate_and_free) == PeakMemory(8000, 400)


def test_a_view_of_an_older_tensor_adds_no_bytes():
    weight = torch.zeros(10, 100)
    assert AllocationTracker().peak_of(lambda: weight.t()[:, None]) == PeakMemory(0, 0)
    assert AllocationTracker().peak_of(lambda: weight.t().contiguous()) == PeakMemory(4000, 4000)


# 16 bytes of scratch per entry, and at the same time the results: 8 values of 4 bytes and 8 indices of 8.
def test_topk_counts_its_scratch_copy():
    x = torch.randn(1000)
    assert AllocationTracker().peak_of(lambda: x.topk(8)) == PeakMemory(16 * 1000 + 8 * 12, 16 * 1000 + 8 * 12)


# The mask of 1000 bytes is converted to 4000 bytes, in addition to the 4000 of the product.
def test_arithmetic_on_two_dtypes_counts_the_converted_copy():
    x = torch.randn(1000)
    mask = x > 0
    assert AllocationTracker().peak_of(lambda: x * mask) == PeakMemory(8000, 8000)
    assert AllocationTracker().peak_of(lambda: x * x) == PeakMemory(4000, 4000)


def loaded_bytes(model: LanguageModel) -> int:
    return measure.module_bytes(model._loaded_root())


@pytest.mark.parametrize("separate_documents", [False, True])
@pytest.mark.parametrize(
    ("backend", "architecture"),
    [(HuggingFaceLM, "gpt2"), (HuggingFaceLM, "llama"), (HuggingFaceLM, "gemma2"), (TransformerLensLM, "gpt2")],
)
def test_a_model_without_weights_has_the_measurements_of_the_loaded_one(
    backend: Any, architecture: str, separate_documents: bool, tmp_path: Path
):
    model = backend(str(save_model(tmp_path / "model", architecture)), "blocks.1.hook_resid_post")
    planned = measure.measure_language_model(model, 32, 60, separate_documents=separate_documents)
    assert model._root is None
    model.load()
    assert planned.weights == loaded_bytes(model)
    visible = torch.ones(32, 60, 60, dtype=torch.bool) if separate_documents and backend is HuggingFaceLM else None
    measured = AllocationTracker().peak_of(lambda: model.activations(torch.zeros(32, 60, dtype=torch.long), visible))
    # The tolerance covers the tokens and the scratch of the CPU's attention with a mask.
    assert planned.forward.bytes == pytest.approx(measured.bytes, rel=0.05)


# GPT-2 has one matrix of 300 x 32 for embedding and head, 64 positions, and 12 * 32^2 weights and 13 * 32 biases and norms per layer.
# The final norm counts too.
@pytest.mark.parametrize(("hook", "layers"), [("blocks.0.hook_resid_post", 1), ("blocks.2.hook_resid_pre", 2), ("transformer.ln_f", 4)])
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_only_layers_up_to_the_hook_are_counted(hook: str, layers: int, dtype: str, size: int, tmp_path: Path):
    model = HuggingFaceLM(str(save_model(tmp_path / "model", "gpt2")), hook, dtype=dtype)
    n_parameters = 300 * 32 + 64 * 32 + layers * (12 * 32**2 + 13 * 32) + 2 * 32
    assert measure.measure_language_model(model, 2, 8).weights == n_parameters * size


# A fused attention kernel never stores the matrix of 2048 x 2048 scores for each of the 4 heads.
def test_attention_on_the_meta_device_counts_no_matrix_of_scores(tmp_path: Path):
    folder = str(save_model(tmp_path / "model", "llama"))
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 2048}))
    wide = measure.measure_language_model(HuggingFaceLM(folder, "blocks.0.hook_resid_post"), 1, 2048).forward.bytes
    assert wide < 4 * 2048 * 2048 * 4


@pytest.mark.parametrize("backend", [HuggingFaceLM, TransformerLensLM])
def test_an_unknown_model_gives_the_same_error_as_loading_it(backend: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines: list[str] = []
    for measure_or_load in (lambda model: measure.measure_language_model(model, 2, 8), lambda model: model.load()):
        with pytest.raises(InputError) as caught:
            measure_or_load(backend("nobody/no-such-model", "blocks.0.hook_resid_post"))
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


# A dry run has every dimension divided by a factor; its bytes times the factor squared are the bytes at full size.
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


# A GPU computes the pre-activations of all rows and latents at once, 4 bytes each; a CPU computes an eighth of these 32 M at a time.
# Beyond 2^30 numbers a GPU works in blocks as well.
def test_a_gpus_step_is_measured_on_the_gpus_code_path(monkeypatch: pytest.MonkeyPatch):
    model = joint(d_in=64, d_sae=8192, meta=False)
    on_cpu, on_gpu = (measure.measure_training(model, 4096, gpu=gpu).evaluation.bytes for gpu in (False, True))
    # Six candidates for each of 32 selected values of a row, each with its value and three indices while they are sorted.
    candidates = 6 * 32 * 4096
    assert on_gpu == pytest.approx(4 * 4096 * 8192 + 28 * candidates, rel=0.02) and on_gpu > 4 * on_cpu
    # In blocks, the candidates of two blocks are held at once.
    monkeypatch.setattr(encoder, "BLOCK", topk.BLOCK)
    in_blocks = measure.measure_training(model, 4096, gpu=True).evaluation.bytes
    assert in_blocks == pytest.approx(4 * topk.BLOCK + 55 * candidates, rel=0.02)


# Nearly all memory of a meta step is decoder rows x meta latents, which ranks divide; the gradients of its weights are not divided.
def test_several_ranks_divide_the_memory_of_a_meta_step():
    one_rank, eight_ranks = (
        measure.measure_training(joint(d_sae=8192, d_in=64), 256, gpu=True, ranks=ranks).meta.bytes for ranks in (1, 8)
    )
    assert eight_ranks == pytest.approx(one_rank / 8, rel=0.05)


# Nearly all memory here is rows x d_sae, and is freed before the next micro-batch begins.
def test_two_micro_batches_take_half_the_memory():
    unsplit, split = (measure.measure_training(joint(d_sae=2048, d_in=32, micro_batches=n, meta=False), 2048).primary.bytes for n in (1, 2))
    assert split == pytest.approx(unsplit / 2, rel=0.1)


# A matrix of the first model is 64 MiB, which malloc returns to the system when freed; one of the second is 4 MiB, or 16 in a sort.
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


# The cosines of a chunk of 512 rows are a 512 x 512 matrix; in a dry run at a quarter of the size they must be 128 x 128.
def test_a_penaltys_chunks_shrink_with_the_dry_run(monkeypatch: pytest.MonkeyPatch):
    model, peaks = joint(d_in=128, d_sae=2048, meta=False, penalty=Orthogonality(chunk_size=512)), dict[int, int]()
    for elements in (2**40, 2**14):
        monkeypatch.setattr(measure, "DRY_RUN_ELEMENTS", elements)
        peaks[elements] = measure.measure_training(model, 16).primary.bytes
    assert peaks[2**14] == pytest.approx(peaks[2**40], rel=0.1)


def test_a_dry_run_changes_neither_the_model_nor_the_global_rng():
    model = joint()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metadata, rng_state = dict(model.primary.sae.cfg.metadata.items()), torch.random.get_rng_state()
    measure.measure_training(model, 512)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert dict(model.primary.sae.cfg.metadata.items()) == metadata
    assert torch.equal(torch.random.get_rng_state(), rng_state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("precision", "times"), [("64-true", 2.0), ("bf16-mixed", 1.0)])
def test_the_precision_changes_the_peak(precision: str, times: float):
    float32, other_precision = (measure.measure_training(joint(kernels="dense"), 512, precision=p) for p in ("32-true", precision))
    assert other_precision.optimizer == pytest.approx(float32.optimizer, rel=0.01)
    if precision == "64-true":
        assert other_precision.primary.bytes == pytest.approx(times * float32.primary.bytes, rel=0.15)
    else:
        assert other_precision.primary.bytes != float32.primary.bytes


# The resident memory of a process that makes one step, whose matrices are 64 MiB each or negligible.
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
    """Resident bytes of this process, and their peak since the last reset (writing 5 to clear_refs, proc(5))."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024, int(status["VmHWM"].split()[0]) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
# Top-k architectures agree within 2 %; one of JumpReLU's ten arrays is inside a kernel and not measured. malloc returns blocks from
# 64 KiB on to the system here, since reuse of a block of 16 MiB would be up to chance: a seventh of batch top-k's step.
@pytest.mark.parametrize(("name", "rel"), [("batchtopk", 0.05), ("topk", 0.05), ("jumprelu", 0.15)])
def test_measured_bytes_equal_the_systems_resident_bytes(name: str, rel: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "LARGE_BLOCK", 2**16)
    measured = measure.measure_training(joint(name, d_in=16, d_sae=4096, meta=False), 4096).primary.bytes
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", RESIDENT.format(name=name)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": "0"}
    resident_bytes = int(subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True).stdout)
    assert measured == pytest.approx(resident_bytes, rel=rel)

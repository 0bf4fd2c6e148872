"""The memory plan: its arithmetic, the runs it refuses, errors that stop no run, and its peak against the measured one."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.optim import SGD
from transformers import GPT2Config, GPT2LMHeadModel

from metasae_lightning import ActivationsDataModule, JointSAE
from metasae_lightning.callbacks import Export
from metasae_lightning.cli import main
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, LanguageModel, device
from metasae_lightning.memory import available
from metasae_lightning.memory import plan as planning
from metasae_lightning.memory.plan import memory_plan
from metasae_lightning.memory.table import MemoryItem, MemoryPlan
from metasae_lightning.penalties import Decomposability, Penalty
from metasae_lightning.sae import step_graph
from tests.cli.test_recipes import save_at_true_width
from tests.helpers.architectures import config
from tests.helpers.models import Texts, documents, save_model

# lightning 2.6 passes `skip_none`, which jsonargparse 4.53 deprecates: https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
ROOT = Path(__file__).parents[2]


def trainer(folder: Path, **kw: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, default_root_dir=folder, enable_progress_bar=False, **kw)


def activations(folder: Path, **kw: Any) -> ActivationsDataModule:
    model = HuggingFaceLM(str(save_model(folder / "model", "gpt2")), "blocks.1.hook_resid_post")
    sizes = {"tokens": 4096, "batch_size": 256, "context_size": 32, "buffer_size": 1024, "validation_tokens": 512, "forward_batch": 4}
    return ActivationsDataModule(model, Texts(documents()), **{**sizes, **kw})


def by_name(plan: MemoryPlan) -> dict[str, MemoryItem]:
    return {item.name: item for item in plan.items}


# A primary of 32 x 64 has two matrices and 64 + 32 biases in float32, as many gradients, and twice as many moments of Adam.
# Its buffers: 64 counts, three counters and a threshold of 8 bytes each, and a flag. The shuffle buffer is 1024 rows of 32 float32.
def test_items_of_the_plan_have_the_bytes_of_their_tensors(tmp_path: Path):
    model = JointSAE(config("batchtopk", 64, d_in=32), config("batchtopk", 16, d_in=32), {"d": Decomposability(0.3)})
    plan = memory_plan(model, activations(tmp_path), trainer(tmp_path, callbacks=[Export(calibration_tokens=300)]))
    items, trainable_bytes = by_name(plan), {64: (2 * 32 * 64 + 96) * 4, 16: (2 * 32 * 16 + 48) * 4}
    assert plan.unplanned == ()
    assert items["primary SAE"].bytes == trainable_bytes[64] + 64 * 8 + 8
    assert items["primary gradients"].bytes == trainable_bytes[64]
    assert items["meta gradients"].bytes == trainable_bytes[16]
    # Fused Adam has a step count in float32 for each of the 8 parameters.
    assert items["optimisers' state"].bytes == pytest.approx(2 * (trainable_bytes[64] + trainable_bytes[16]) + 8 * 4, abs=8)
    assert items["shuffle buffer"].bytes == 1024 * 32 * 4
    # 300 tokens are two whole batches of 256.
    assert items["held-out rows"].bytes == 512 * 32 * 4
    checkpoint_bytes = trainable_bytes[64] + trainable_bytes[16] + items["optimisers' state"].bytes
    assert items["a checkpoint"].bytes == pytest.approx(checkpoint_bytes, rel=0.1)
    assert {item.device for item in plan.items} == {"cpu"}


def test_a_sharded_primary_is_planned_as_the_shard_of_one_rank(tmp_path: Path):
    model = JointSAE(config("batchtopk", 64, d_in=32), config("batchtopk", 16, d_in=32), {"d": Decomposability(0.3)})
    several_ranks = trainer(tmp_path, callbacks=[Export(calibration_tokens=300)])
    several_ranks.strategy.shards = 4
    plan = memory_plan(model, activations(tmp_path), several_ranks)
    items = by_name(plan)
    assert plan.unplanned == ()
    # A quarter of two matrices and of one bias, and the other bias, in float32; the meta SAE is not sharded.
    assert items["primary gradients"].bytes == (2 * 32 * 16 + 16 + 32) * 4
    assert items["meta gradients"].bytes == (2 * 32 * 16 + 16 + 32) * 4
    assert (
        "1,024 rows" in items["a primary step"].explanation and "16 decoder rows" in items["a meta step"].explanation
    )  # 256 rows of each of four ranks
    unsharded = (2 * 32 * 64 + 64 + 32) * 4
    assert items["building them"].bytes > unsharded and items["an export"].bytes > 2 * unsharded


@pytest.mark.parametrize(("setting", "bytes"), [({"buffer_dtype": "bfloat16"}, 1024 * 32 * 2), ({"buffer_size": 10**9}, 4096 * 32 * 4)])
def test_the_buffer_has_its_dtype_and_at_most_all_tokens(setting: dict[str, Any], bytes: int, tmp_path: Path):
    plan = memory_plan(JointSAE(config("topk", d_in=32)), activations(tmp_path, **setting), trainer(tmp_path))
    assert by_name(plan)["shuffle buffer"].bytes == bytes


def test_a_buffer_in_the_checkpoint_is_written_to_memory_first(tmp_path: Path):
    plan = memory_plan(JointSAE(config("topk", d_in=32)), activations(tmp_path, checkpoint_buffer="activations"), trainer(tmp_path))
    assert by_name(plan)["its checkpoint"].bytes == 2 * 1024 * 32 * 4


# With cached activations, neither the model nor a shuffle buffer is in memory.
def test_a_cache_needs_neither_model_nor_buffer(tmp_path: Path):
    data = activations(tmp_path, cache=str(tmp_path / "cache"))
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, trainer(tmp_path))
    assert not {"language model", "its forward pass", "shuffle buffer"} & set(by_name(plan))
    assert "a primary step" in by_name(plan)


def test_a_plan_has_no_items_for_parts_that_the_run_does_not_have(tmp_path: Path):
    data = SimpleNamespace(batch_size=64, validation_tokens=64)
    module = JointSAE(config("topk"), primary_optimizer=lambda p: SGD(p, lr=1.0))
    plan = memory_plan(module, data, trainer(tmp_path, enable_checkpointing=False))
    steps = {"optimisers' state", "a primary step", "a held-out batch"}
    assert set(by_name(plan)) == {"this process", "primary SAE", "primary gradients"} | steps
    assert by_name(plan)["optimisers' state"].bytes == 0


def trainer_on_gpus(*numbers: int, rank: int = 0, **changes: Any) -> Any:
    """A stand-in for a trainer whose SAEs are on these GPUs, with the attributes that a plan reads."""
    devices = [torch.device("cuda", number) for number in numbers]
    strategy = SimpleNamespace(root_device=devices[rank], parallel_devices=devices, local_rank=rank, checkpoint_io=None)
    attributes = {"precision": "32-true", "callbacks": [], "checkpoint_callbacks": [], "world_size": len(devices)}
    return SimpleNamespace(strategy=strategy, **{**attributes, **changes})


# On a GPU: the model is loaded through host memory, batches are made in parallel to steps, and the buffer can stay on the host.
def test_every_item_is_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "count_gpus", lambda: 1)
    data = activations(tmp_path, buffer_device="cpu")
    data.language_model.requested_device = "cuda:0"
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, trainer_on_gpus(0, checkpoint_callbacks=[1]))
    on_host = {item.name for item in plan.items if item.device == "cpu"}
    assert on_host == {"this process", "loading it", "shuffle buffer", "a checkpoint"}
    assert by_name(plan)["its forward pass"].phase == ""
    assert by_name(plan)["a primary step"].small_bytes == 0
    assert {item.device for item in plan.items} == {"cpu", "cuda:0"}


def test_recorded_steps_are_planned_on_one_gpu_where_steps_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def plan(*gpus: int, **settings: Any) -> dict[str, MemoryItem]:
        model = JointSAE(config("batchtopk", d_in=32), config("batchtopk", 12, d_in=32), {"d": Decomposability(0.3)}, **settings)
        return by_name(memory_plan(model, activations(tmp_path), trainer_on_gpus(*gpus)))

    items = plan(0)
    assert items["CUDA graphs"].bytes == items["a primary step"].bytes + items["a meta step"].bytes
    assert items["CUDA graphs"].phase == "" and items["CUDA graphs"].device == "cuda:0"
    assert plan(0, micro_batches=2)["CUDA graphs"].bytes == items["a meta step"].bytes
    assert "CUDA graphs" not in plan(0, cuda_graph=False)
    assert "CUDA graphs" not in plan(0, 1)
    monkeypatch.setattr(step_graph, "MOST_MULTIPLICATIONS", 1000)
    assert "CUDA graphs" not in plan(0)


# `cuda` and `auto` mean the SAE's device: under a second name its free memory would be counted twice.
@pytest.mark.parametrize("requested", ["cuda", "auto"])
def test_cuda_and_auto_are_the_saes_device(requested: str, tmp_path: Path):
    data = activations(tmp_path)
    data.language_model.requested_device = requested
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, trainer_on_gpus(0, 1, rank=1))
    assert {item.device for item in plan.items} == {"cpu", "cuda:1"}


# The second rank of two has GPUs 1 and 3 of four. Two finished batches of 256 rows of 32 float32 are on the SAE's GPU.
def test_a_language_model_with_a_gpu_of_its_own_is_counted_on_that_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "count_gpus", lambda: 4)
    data = activations(tmp_path)
    data.language_model.requested_device = "own"
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, trainer_on_gpus(0, 1, rank=1))
    assert {item.name for item in plan.items if item.device == "cuda:3"} == {"language model", "its forward pass", "shuffle buffer"}
    assert by_name(plan)["batches made ahead"] == MemoryItem(
        "batches made ahead", "cuda:1", 2 * 256 * 32 * 4, "2 of 0 MiB, float32", "lower prefetch"
    )
    assert by_name(plan)["a primary step"].device == "cuda:1"
    free = {device: plan.peak(device) for device in plan.devices}
    plan.check(free)
    with pytest.raises(InputError, match=r"memory: the run needs .* GiB on cuda:3, and .* available") as caught:
        plan.check({**free, "cuda:3": free["cuda:3"] - 1})
    assert "shuffle buffer" in str(caught.value) and "\n" not in str(caught.value)


def plan_with_phases() -> MemoryPlan:
    step = MemoryItem("a big step", "cpu", 8 * 2**30, "", "lower batch_size", phase="batch")
    its_buffer = MemoryItem("its buffer", "cpu", 2**30, "", "lower buffer_size")
    return MemoryPlan(
        (its_buffer, step, MemoryItem("another step", "cpu", 6 * 2**30, "", "lower it", phase="decoder"), MemoryItem("d", "cuda:0", 1, ""))
    )


def test_the_peak_counts_the_largest_phase_once():
    assert plan_with_phases().peak("cpu") == 9 * 2**30


def test_the_peak_adds_small_blocks_of_all_phases():
    parts = [("x", 40, 30), ("x", 20, 20), ("y", 10, 10)]
    assert (
        MemoryPlan(tuple(MemoryItem("", "cpu", size, "", phase=kind, small_bytes=small) for kind, size, small in parts)).peak("cpu")
        == 30 + 10 + 10
    )


def test_the_error_names_the_largest_items_and_their_remedies():
    plan_with_phases().check({"cpu": 9 * 2**30, "cuda:0": 1})
    with pytest.raises(InputError) as caught:
        plan_with_phases().check({"cpu": 9 * 2**30 - 1, "cuda:0": 1})
    listed = "a big step 8.00 (lower batch_size); another step 6.00 (lower it); its buffer 1.00 (lower buffer_size)"
    assert str(caught.value).startswith("memory: the run needs 9.00 GiB on cpu, and 9.00 are available")
    assert str(caught.value).endswith(listed)
    assert "\n" not in str(caught.value)


def fit(run: Path, *flags: str) -> int:
    return main(["fit", "-c", "synthetic", "--run", str(run), "--data.init_args.tokens", "2048", *flags])


def test_a_run_over_the_limit_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fit(tmp_path / "run", "--memory_gib", "0.01") == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"metasae: error: memory: the run needs \d\.\d\d GiB on cpu, and 0\.01 are available .*\n", error)
    assert not (tmp_path / "run").exists()


def test_no_model_is_loaded_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(LanguageModel, "load", lambda self: pytest.fail("loaded"))
    name = f"--data.init_args.language_model.init_args.name={save_model(tmp_path / 'model', 'llama', layers=16)}"
    words = ["fit", "-c", "quickstart", "--run", str(tmp_path / "run"), "--data.init_args.context_size", "64", name]
    capsys.readouterr()
    for change, says in (
        (["--memory_gib", "0.1", *(f"--model.init_args.{sae}.init_args.d_in=32" for sae in ("primary", "meta"))], "memory: the run needs"),
        (["--data.init_args.context_size", "65"], "context_size must be at most 64, the model's longest context, got 65"),
        ([], "arms.solo: primary.d_in is 576, but the activations are 32 wide: set d_in: 32"),
    ):
        assert main([*words, *change]) == 2
        error = capsys.readouterr().err
        assert error.startswith("metasae: error: ") and error.count("\n") == 1 and says in error
    assert not (tmp_path / "run").exists()


def test_a_limit_above_the_machines_memory_ends_in_one_line_where_memory_cannot_be_allocated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    sizes = ["--model.init_args.primary.init_args.d_sae", "1_000_000_000_000_000"]
    assert fit(tmp_path / "run", "--memory_gib", "1e15", *sizes) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "metasae: error: memory: 256000000000000000 bytes could not be allocated: use smaller sizes or more memory"
    assert "no plan (--memory_gib allows more than there is" in lines[0] and len(lines) == 2 and not (tmp_path / "run").exists()


# A limit that the user sets is not checked against the machine, which has no million GiB.
def test_memory_gib_replaces_the_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(planning, "available_bytes", lambda device, processes: 1)
    assert fit(tmp_path / "refused") == 2
    assert fit(tmp_path / "run", "--memory_gib", "1000000") == 0
    assert (tmp_path / "run" / "config.yaml").exists()
    assert fit(tmp_path / "nothing", "--memory_gib", "0") == 2
    assert "memory_gib must be more than 0" in capsys.readouterr().err


class FixedSizePenalty(Penalty):
    """A penalty that raises in a dry run, since it accepts one decoder size only."""

    def forward(self, W_dec: torch.Tensor, critic: Any, step: int) -> torch.Tensor:
        if W_dec.shape != (4096, 512):
            raise RuntimeError("only at full size")
        return W_dec.square().sum()


def test_an_item_that_cannot_be_planned_is_named_and_stops_no_run(tmp_path: Path):
    model = JointSAE(config("topk", 4096, d_in=512), penalties={"particular": FixedSizePenalty(1.0)})
    plan = memory_plan(model, SimpleNamespace(batch_size=64), trainer(tmp_path))
    assert plan.unplanned == ("training (RuntimeError: only at full size)",)
    assert "primary SAE" in by_name(plan)


def test_a_plan_that_fails_stops_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(planning, "memory_plan", lambda *_: 1 / 0)
    assert fit(tmp_path / "run") == 0
    assert "memory: no plan (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_a_wrong_hook_is_an_error_of_the_plan(tmp_path: Path):
    data = activations(tmp_path)
    data.language_model.hooks = ["blocks.99.hook_resid_post"]
    with pytest.raises(InputError, match=r"hook: .* has no 'blocks.99.hook_resid_post'"):
        planning.print_and_check_plan(JointSAE(config("topk", d_in=32)), data, trainer(tmp_path))


# Containers are killed by their control group's limit, whatever the machine has.
def test_a_control_groups_limit_bounds_the_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("123456\n")
    monkeypatch.setattr(available, "CONTROL_GROUP_LIMITS", (str(tmp_path / "none"), str(tmp_path / "max")))
    assert available.available_bytes("cpu") > 2**27
    monkeypatch.setattr(available.psutil, "virtual_memory", lambda: SimpleNamespace(available=400 * 2**30))
    assert available.available_bytes("cpu", 4) < 110 * 2**30 < planning.available_bytes("cpu")
    monkeypatch.setattr(available, "CONTROL_GROUP_LIMITS", (str(tmp_path / "max"), str(tmp_path / "limit")))
    assert available.available_bytes("cpu") == 123456
    assert available.available_bytes("cpu", 4) == 123456 // 4  # each of four ranks has a quarter


# A meta SAE is measured on 4096 decoder rows at a time: 4096 x 2048 dense latents of 4 and 16 bytes; the primary on 16 rows.
def test_an_export_of_a_meta_sae_is_planned_with_latents_of_4096_decoder_rows(tmp_path: Path):
    model = JointSAE(config("batchtopk", 8192, d_in=32), config("batchtopk", 2048, d_in=32), {"d": Decomposability(0.3)})
    plan = memory_plan(model, activations(tmp_path, batch_size=16), trainer(tmp_path, callbacks=[Export(calibration_tokens=300)]))
    several_ranks = trainer(tmp_path, callbacks=[Export(calibration_tokens=300)])
    two_copies = 2 * by_name(plan)["primary SAE"].bytes
    assert by_name(plan)["an export"].bytes == pytest.approx(two_copies + 20 * 4096 * 2048, rel=0.01)
    several_ranks.strategy.num_processes = 4  # one of them exports
    on_four_ranks = by_name(memory_plan(model, activations(tmp_path, batch_size=16), several_ranks))["an export"]
    assert (
        on_four_ranks.bytes == pytest.approx(by_name(plan)["an export"].bytes / 4, rel=0.01)
        and "on one of 4 ranks" in on_four_ranks.explanation
    )


# A run in a process of its own that prints its peak memory at its end: VmHWM of proc(5), in KiB. ru_maxrss would not do, since it
# starts with the memory of the parent at the fork.
RUN = """
import sys
from pathlib import Path
from metasae_lightning.cli import main
assert main(sys.argv[1:]) == 0
print("VmHWM", next(item.split()[1] for item in Path("/proc/self/status").read_text().splitlines() if item.startswith("VmHWM")))
"""


def planned_and_measured_peak(*arguments: str) -> tuple[float, float]:
    """Peak in MiB, as planned and as the system measured it."""
    command = [sys.executable, "-W", "ignore", "-c", RUN, "fit", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    planned = re.search(r"cpu, peak\W+([\d,]+)", process.stderr)
    measured = re.search(r"VmHWM (\d+)", process.stdout)
    assert planned and measured, process.stderr
    print(f"planned {planned[1]} MiB, measured {int(measured[1]) // 1024:,} MiB")
    return float(planned[1].replace(",", "")), int(measured[1]) / 1024


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("buffer_size", "tokens"), [(4096, 8192), (32_768, 33_792)])
def test_the_planned_peak_of_the_quickstart_equals_the_measured_one(buffer_size: int, tokens: int, tmp_path: Path):
    sizes = {"tokens": tokens, "buffer_size": buffer_size, "validation_tokens": 4096, "test_tokens": 4096}
    flags = [word for key, value in sizes.items() for word in (f"--data.init_args.{key}", str(value))]
    planned, measured = planned_and_measured_peak("-c", "quickstart", "--run", str(tmp_path / "run"), *flags)
    assert planned == pytest.approx(measured, rel=0.15)


# Two batches of the recipe's own size. Latents are dead from the second batch on, as the plan assumes.
@linux
@pytest.mark.slow
def test_the_planned_peak_of_gpt2_large_equals_the_measured_one(tmp_path: Path):
    try:
        sizes = {"n_embd": 1280, "n_head": 20, "vocab_size": 50257, "n_positions": 1024, "n_ctx": 1024}
        # Layers after the hook are not loaded, so they are not saved either.
        model = save_at_true_width(tmp_path / "model", GPT2LMHeadModel, GPT2Config(n_layer=21, bos_token_id=0, eos_token_id=1, **sizes))
        (tmp_path / "texts.txt").write_text("\n\n".join(documents(1000)))
        corpus = {"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(tmp_path / "texts.txt")}}
        flags = {
            "trainer.accelerator": "cpu",
            "trainer.precision": "32-true",
            "trainer.val_check_interval": "1.0",
            "data.init_args.language_model.init_args.dtype": "float32",
            "data.init_args.language_model.init_args.name": str(model),
            "data.init_args.corpus": json.dumps(corpus),
            "data.init_args.tokens": "8192",
            "data.init_args.validation_tokens": "4096",
            "data.init_args.held_out": "0.1",
            "model.init_args.dead_after_tokens": "1",
            "model.init_args.meta_dead_after_steps": "1",
        }
        words = [word for key, value in flags.items() for word in (f"--{key}", value)]
        planned, measured = planned_and_measured_peak("-c", "gpt2_large_l20", "--run", str(tmp_path / "run"), *words)
    finally:
        shutil.rmtree(tmp_path)
    assert planned == pytest.approx(measured, rel=0.15)

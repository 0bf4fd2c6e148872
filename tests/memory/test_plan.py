"""The plan's arithmetic, what it refuses, what it survives, and whether the peak it names is the peak that comes."""

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
from metasae_lightning.memory import plan as planning
from metasae_lightning.memory.plan import memory_plan
from metasae_lightning.memory.table import Line, Plan
from metasae_lightning.penalties import Decomposability, Penalty
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


def by_name(plan: Plan) -> dict[str, Line]:
    return {line.what: line for line in plan.lines}


# Of a primary of 32 x 64: two matrices, 64 + 32 biases, all trained, in float32; as many gradients; twice as many moments.
# Its buffers beside: 64 counts, three counters, and a threshold of 8 bytes each, and a flag. The buffer is 1024 rows of 32 float32.
def test_the_plan_is_arithmetic(tmp_path: Path):
    model = JointSAE(config("batchtopk", 64, d_in=32), config("batchtopk", 16, d_in=32), {"d": Decomposability(0.3)})
    plan = memory_plan(model, activations(tmp_path), trainer(tmp_path, callbacks=[Export(calibration_tokens=300)]))
    lines, trained = by_name(plan), {64: (2 * 32 * 64 + 96) * 4, 16: (2 * 32 * 16 + 48) * 4}
    assert plan.unknown == ()
    assert lines["primary SAE"].bytes == trained[64] + 64 * 8 + 3 * 8 + 8 + 1
    assert lines["primary gradients"].bytes == trained[64]
    assert lines["meta gradients"].bytes == trained[16]
    # fused Adam counts its steps in a float32 for each of the 8 parameters.
    assert lines["optimisers' state"].bytes == pytest.approx(2 * (trained[64] + trained[16]) + 8 * 4, abs=8)
    assert lines["shuffle buffer"].bytes == 1024 * 32 * 4
    # 300 tokens are two whole batches of 256.
    assert lines["held-out rows"].bytes == 512 * 32 * 4
    weights = trained[64] + trained[16] + lines["optimisers' state"].bytes
    assert lines["a checkpoint"].bytes == pytest.approx(weights, rel=0.1)
    assert {line.device for line in plan.lines} == {"cpu"}


def test_a_divided_dictionary_is_planned_as_one_ranks_part_of_it(tmp_path: Path):
    model = JointSAE(config("batchtopk", 64, d_in=32), config("batchtopk", 16, d_in=32), {"d": Decomposability(0.3)})
    asked = trainer(tmp_path, callbacks=[Export(calibration_tokens=300)])
    asked.strategy.shards = 4
    plan = memory_plan(model, activations(tmp_path), asked)
    lines = by_name(plan)
    assert plan.unknown == ()
    # A quarter of two matrices and of a bias, the other bias, in float32; the meta SAE is whole.
    assert lines["primary gradients"].bytes == (2 * 32 * 16 + 16 + 32) * 4
    assert lines["meta gradients"].bytes == (2 * 32 * 16 + 16 + 32) * 4
    assert "1,024 rows" in lines["a primary step"].how and "16 decoder rows" in lines["a meta step"].how  # 256 of each of four
    whole = (2 * 32 * 64 + 64 + 32) * 4
    assert lines["building them"].bytes > whole and lines["an export"].bytes > 2 * whole


@pytest.mark.parametrize(("setting", "bytes"), [({"buffer_dtype": "bfloat16"}, 1024 * 32 * 2), ({"buffer_size": 10**9}, 4096 * 32 * 4)])
def test_the_buffer_is_what_will_be_in_it(setting: dict[str, Any], bytes: int, tmp_path: Path):
    plan = memory_plan(JointSAE(config("topk", d_in=32)), activations(tmp_path, **setting), trainer(tmp_path))
    assert by_name(plan)["shuffle buffer"].bytes == bytes


def test_a_buffer_in_the_checkpoint_is_written_to_memory_first(tmp_path: Path):
    plan = memory_plan(JointSAE(config("topk", d_in=32)), activations(tmp_path, checkpoint_buffer="activations"), trainer(tmp_path))
    assert by_name(plan)["its checkpoint"].bytes == 2 * 1024 * 32 * 4


# A cache is on the disk: neither a model nor a buffer of activations is in memory.
def test_a_cache_needs_neither_model_nor_buffer(tmp_path: Path):
    data = activations(tmp_path, cache=str(tmp_path / "cache"))
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, trainer(tmp_path))
    assert not {"language model", "its forward pass", "shuffle buffer"} & set(by_name(plan))
    assert "a primary step" in by_name(plan)


def test_what_a_run_has_not_has_no_line(tmp_path: Path):
    data = SimpleNamespace(batch_size=64, validation_tokens=64)
    plain = JointSAE(config("topk"), primary_optimizer=lambda p: SGD(p, lr=1.0))
    plan = memory_plan(plain, data, trainer(tmp_path, enable_checkpointing=False))
    steps = {"optimisers' state", "a primary step", "a held-out batch"}
    assert set(by_name(plan)) == {"this process", "primary SAE", "primary gradients"} | steps
    assert by_name(plan)["optimisers' state"].bytes == 0


def on_gpus(*numbers: int, rank: int = 0, **more: Any) -> Any:
    """A trainer whose SAEs lie there, as far as a plan looks at one."""
    devices = [torch.device("cuda", number) for number in numbers]
    strategy = SimpleNamespace(root_device=devices[rank], parallel_devices=devices, local_rank=rank, checkpoint_io=None)
    plain = {"precision": "32-true", "callbacks": [], "checkpoint_callbacks": [], "world_size": len(devices)}
    return SimpleNamespace(strategy=strategy, **{**plain, **more})


# On a GPU: the model passes through the host, batches are made beside the steps, and the buffer may stay behind.
def test_every_thing_is_on_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "count_gpus", lambda: 1)
    data = activations(tmp_path, buffer_device="cpu")
    data.language_model.requested_device = "cuda:0"
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, on_gpus(0, checkpoint_callbacks=[1]))
    on_host = {line.what for line in plan.lines if line.device == "cpu"}
    assert on_host == {"this process", "loading it", "shuffle buffer", "a checkpoint"}
    assert by_name(plan)["its forward pass"].phase == ""
    assert by_name(plan)["a primary step"].small == 0
    assert {line.device for line in plan.lines} == {"cpu", "cuda:0"}


# What `cuda` and `auto` name is the SAE's: two names would be two devices, each with all of it free.
@pytest.mark.parametrize("asked", ["cuda", "auto"])
def test_a_device_has_one_name(asked: str, tmp_path: Path):
    data = activations(tmp_path)
    data.language_model.requested_device = asked
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, on_gpus(0, 1, rank=1))
    assert {line.device for line in plan.lines} == {"cpu", "cuda:1"}


# Of four GPUs the second rank has numbers 1 and 3. Two batches of 256 rows of 32 float32 wait where the SAE is.
def test_a_language_model_with_a_gpu_of_its_own_is_counted_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "count_gpus", lambda: 4)
    data = activations(tmp_path)
    data.language_model.requested_device = "own"
    plan = memory_plan(JointSAE(config("topk", d_in=32)), data, on_gpus(0, 1, rank=1))
    assert {line.what for line in plan.lines if line.device == "cuda:3"} == {"language model", "its forward pass", "shuffle buffer"}
    assert by_name(plan)["batches made ahead"] == Line(
        "batches made ahead", "cuda:1", 2 * 256 * 32 * 4, "2 of 0 MiB, float32", "lower prefetch"
    )
    assert by_name(plan)["a primary step"].device == "cuda:1"
    free = {device: plan.peak(device) for device in plan.devices}
    plan.check(free)
    with pytest.raises(InputError, match=r"memory: the run needs .* GiB of cuda:3 and may have") as caught:
        plan.check({**free, "cuda:3": free["cuda:3"] - 1})
    assert "shuffle buffer" in str(caught.value) and "\n" not in str(caught.value)


def phases() -> Plan:
    big = Line("a big step", "cpu", 8 * 2**30, "", "lower batch_size", phase="batch")
    other = Line("its buffer", "cpu", 2**30, "", "lower buffer_size")
    return Plan((other, big, Line("its like", "cpu", 6 * 2**30, "", "lower it", phase="decoder"), Line("d", "cuda:0", 1, "")))


def test_phases_take_turns():
    assert phases().peak("cpu") == 9 * 2**30


def test_small_blocks_of_one_size_share_their_holes():
    parts = [("x", 40, 30), ("x", 20, 20), ("y", 10, 10)]
    assert Plan(tuple(Line("", "cpu", size, "", phase=kind, small=small) for kind, size, small in parts)).peak("cpu") == 30 + 10 + 10


def test_a_run_that_does_not_fit_is_told_what_to_change():
    phases().check({"cpu": 9 * 2**30, "cuda:0": 1})
    with pytest.raises(InputError) as caught:
        phases().check({"cpu": 9 * 2**30 - 1, "cuda:0": 1})
    largest = "a big step 8.00 (lower batch_size); its like 6.00 (lower it); its buffer 1.00 (lower buffer_size)"
    assert str(caught.value).startswith("memory: the run needs 9.00 GiB of cpu and may have 9.00")
    assert str(caught.value).endswith(largest)
    assert "\n" not in str(caught.value)


def fit(run: Path, *flags: str) -> int:
    return main(["fit", "-c", "synthetic", "--run", str(run), "--data.init_args.tokens", "2048", *flags])


def test_over_the_limit_nothing_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert fit(tmp_path / "run", "--memory_gib", "0.01") == 2
    error = capsys.readouterr().err
    assert re.search(r"^metasae: error: memory: the run needs \d\.\d\d GiB of cpu and may have 0.01", error, re.MULTILINE)
    assert "cpu, at its height" in error
    assert not (tmp_path / "run").exists()


def test_no_model_is_loaded_for_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(LanguageModel, "load", lambda self: pytest.fail("loaded"))
    name = f"--data.init_args.language_model.init_args.name={save_model(tmp_path / 'model', 'llama', layers=16)}"
    assert main(["fit", "-c", "quickstart", "--run", str(tmp_path / "run"), "--memory_gib", "0.1", name]) == 2
    assert "language model" in capsys.readouterr().err


# A limit that is set by hand is believed: nobody has a million GiB.
def test_a_limit_by_hand_overrules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(planning, "may_be_had", lambda device, processes: 1)
    assert fit(tmp_path / "refused") == 2
    assert fit(tmp_path / "run", "--memory_gib", "1000000") == 0
    assert (tmp_path / "run" / "config.yaml").exists()
    assert fit(tmp_path / "nothing", "--memory_gib", "0") == 2
    assert "memory_gib must be more than 0" in capsys.readouterr().err


class Particular(Penalty):
    """Works on rows of its own width only."""

    def forward(self, W_dec: torch.Tensor, critic: Any, step: int) -> torch.Tensor:
        if W_dec.shape != (4096, 512):
            raise RuntimeError("only as it is")
        return W_dec.square().sum()


def test_what_cannot_be_planned_is_said_and_stops_nothing(tmp_path: Path):
    model = JointSAE(config("topk", 4096, d_in=512), penalties={"particular": Particular(1.0)})
    plan = memory_plan(model, SimpleNamespace(batch_size=64), trainer(tmp_path))
    assert plan.unknown == ("training (RuntimeError: only as it is)",)
    assert "primary SAE" in by_name(plan)


def test_a_broken_plan_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(planning, "memory_plan", lambda *_: 1 / 0)
    assert fit(tmp_path / "run") == 0
    assert "memory: no plan (ZeroDivisionError: division by zero)" in capsys.readouterr().err


def test_a_mistake_in_the_model_is_said_at_once(tmp_path: Path):
    data = activations(tmp_path)
    data.language_model.hooks = ["blocks.99.hook_resid_post"]
    with pytest.raises(InputError, match=r"hook: .* has no 'blocks.99.hook_resid_post'"):
        planning.announce(JointSAE(config("topk", d_in=32)), data, trainer(tmp_path))


# Containers are killed by their control group's limit, whatever the machine has.
def test_a_control_groups_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("123456\n")
    monkeypatch.setattr(planning, "LIMITS", (str(tmp_path / "none"), str(tmp_path / "max")))
    assert planning.may_be_had("cpu") > 2**27
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: SimpleNamespace(available=400 * 2**30))
    assert planning.may_be_had("cpu", 4) < 110 * 2**30 < planning.may_be_had("cpu")
    monkeypatch.setattr(planning, "LIMITS", (str(tmp_path / "max"), str(tmp_path / "limit")))
    assert planning.may_be_had("cpu") == 123456
    assert planning.may_be_had("cpu", 4) == 123456 // 4  # of so many ranks each has its share


# A meta SAE is checked on some decoder rows at a time: 4096 x 2048 dense latents, in 4 and 16 bytes each; the primary on 16 rows.
def test_an_export_holds_some_rows_latents(tmp_path: Path):
    model = JointSAE(config("batchtopk", 8192, d_in=32), config("batchtopk", 2048, d_in=32), {"d": Decomposability(0.3)})
    plan = memory_plan(model, activations(tmp_path, batch_size=16), trainer(tmp_path, callbacks=[Export(calibration_tokens=300)]))
    asked = trainer(tmp_path, callbacks=[Export(calibration_tokens=300)])
    twins = 2 * by_name(plan)["primary SAE"].bytes
    assert by_name(plan)["an export"].bytes == pytest.approx(twins + 20 * 4096 * 2048, rel=0.01)
    asked.strategy.num_processes = 4  # of which one exports
    again = by_name(memory_plan(model, activations(tmp_path, batch_size=16), asked))["an export"]
    assert again.bytes == pytest.approx(by_name(plan)["an export"].bytes / 4, rel=0.01) and "of one of 4 ranks" in again.how


# A run in a process of its own, which says at its end what the most was that it held: VmHWM of proc(5), in KiB. ru_maxrss would do,
# but begins with what the parent held when it forked.
RUN = """
import sys
from pathlib import Path
from metasae_lightning.cli import main
assert main(sys.argv[1:]) == 0
print("VmHWM", next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def planned_and_held(*arguments: str) -> tuple[float, float]:
    """MiB at the height, as the plan says and as the system saw."""
    command = [sys.executable, "-W", "ignore", "-c", RUN, "fit", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    planned = re.search(r"cpu, at its height\W+([\d,]+)", done.stderr)
    held = re.search(r"VmHWM (\d+)", done.stdout)
    assert planned and held, done.stderr
    print(f"planned {planned[1]} MiB, held {int(held[1]) // 1024:,} MiB")
    return float(planned[1].replace(",", "")), int(held[1]) / 1024


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("buffer_size", "tokens"), [(4096, 8192), (32_768, 33_792)])
def test_the_quickstart_holds_what_was_planned(buffer_size: int, tokens: int, tmp_path: Path):
    sizes = {"tokens": tokens, "buffer_size": buffer_size, "validation_tokens": 4096, "test_tokens": 4096}
    flags = [word for key, value in sizes.items() for word in (f"--data.init_args.{key}", str(value))]
    planned, held = planned_and_held("-c", "quickstart", "--run", str(tmp_path / "run"), *flags)
    assert planned == pytest.approx(held, rel=0.15)


# Two batches of the recipe's own size. Latents are dead from the second batch on, as the plan has them.
@linux
@pytest.mark.slow
def test_gpt2_large_holds_what_was_planned(tmp_path: Path):
    try:
        sizes = {"n_embd": 1280, "n_head": 20, "vocab_size": 50257, "n_positions": 1024, "n_ctx": 1024}
        # Layers after the hook are not loaded, so that they need not be on the disk either.
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
        planned, held = planned_and_held("-c", "gpt2_large_l20", "--run", str(tmp_path / "run"), *words)
    finally:
        shutil.rmtree(tmp_path)
    assert planned == pytest.approx(held, rel=0.15)

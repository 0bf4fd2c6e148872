"""Runs with latents sharded over ranks: their checkpoints load on any number of ranks, and are written atomically."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from metasae_lightning import atomic_files
from metasae_lightning.errors import InputError
from metasae_lightning.sae import load_pretrained
from metasae_lightning.training import JointSAE
from metasae_lightning.training.checkpoint_files import find_damage, link_and_prune, newest_intact
from metasae_lightning.training.checkpoint_folder import merge_parts, part_checksums, write_checksums
from tests.helpers.architectures import config
from tests.helpers.checkpoints import write_parts
from tests.helpers.command_line import CommandLine

ROOT = Path(__file__).parents[2]
SIZES = {"tokens": 16_384, "batch_size": 256, "validation_tokens": 2048}


def fit(run: Path, *options: str, callbacks: list[Any] = [{"class_path": "Export"}], rc: int = 0) -> str:  # noqa: B006
    overlay = run.with_suffix(".yaml")
    save_often = {"class_path": "Checkpoints", "init_args": {"every_tokens": 4096, "keep": 4}}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [*callbacks, save_often]}}))
    sizes = [f"--data.init_args.{name}={value}" for name, value in SIZES.items()]
    command = CommandLine(["fit", "-c", "synthetic", "-c", str(overlay), "--run", str(run), *sizes, *options], cwd=ROOT)
    _, stderr = command.communicate()
    assert command.returncode == rc, stderr[-3000:]
    return stderr


def sharded_options(ranks: int, *options: str) -> list[str]:
    return ["--trainer.devices", str(ranks), "--trainer.strategy", "sharded", *options]


def weights(run: Path) -> dict[str, torch.Tensor]:
    state_by_role = [(role, load_file(run / "saes" / role / "sae_weights.safetensors")) for role in ("primary", "meta")]
    return {f"{role} {key}": value for role, state in state_by_role for key, value in state.items()}


def start_state(run: Path, checkpoint: Path, *options: str) -> dict[str, torch.Tensor]:
    """The state of a resumed run before its first step."""
    fit(
        run,
        *options,
        "--ckpt_path",
        str(checkpoint),
        callbacks=[{"class_path": "tests.helpers.kept.SaveStartState", "init_args": {"path": f"{run}.pt"}}],
    )
    return torch.load(f"{run}.pt")


def test_a_checkpoint_of_four_ranks_is_resumed_on_two_and_on_one(tmp_path: Path):
    fit(tmp_path / "four", *sharded_options(4))
    middle = tmp_path / "four" / "checkpoints" / "tokens=8192.ckpt"
    assert len(list(middle.glob("*.distcp"))) == 4 and find_damage(middle) is None
    on_two, on_one = start_state(tmp_path / "two", middle, *sharded_options(2)), start_state(tmp_path / "one", middle)
    on_ddp = start_state(tmp_path / "every", middle, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    merged = merge_parts(middle)
    states = [{**merged["state_dict"]}, on_two, on_one, on_ddp]
    for state in states[1:]:
        assert state.keys() == on_one.keys() and all(torch.equal(state[name], on_one[name]) for name in on_one)
        assert all(torch.equal(state[name], value) for name, value in states[0].items())
    assert on_one["primary.sae.W_enc exp_avg"].count_nonzero() > 0 and on_one["primary.steps"] == 8

    # Four ranks with another split of latents and rows reach the same weights, and export one SAE folder.
    mesh = {"class_path": "metasae_lightning.strategy.Sharded", "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 2}}
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": mesh}}))
    fit(tmp_path / "square", "-c", str(tmp_path / "mesh.yaml"), "--trainer.devices", "4", "--ckpt_path", str(middle))
    expected, exported = weights(tmp_path / "four"), weights(tmp_path / "square")
    for name, value in expected.items():
        assert (exported[name] - value).norm() <= 1e-5 * value.norm(), name
    sae: Any = load_pretrained(tmp_path / "four" / "saes" / "primary")
    assert sae.W_dec.shape == (256, 64)


def test_an_unsharded_checkpoint_of_arms_is_sharded_when_loaded(tmp_path: Path):
    arms = ["--arms", yaml.safe_dump({"joint": {}, "solo": {"meta": None, "penalties": {}}}, default_flow_style=True).strip()]
    ddp_options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *arms]
    fit(tmp_path / "ddp", *ddp_options)
    middle = tmp_path / "ddp" / "checkpoints" / "tokens=8192.ckpt"
    fit(tmp_path / "divided", *sharded_options(2, *arms), "--ckpt_path", str(middle))
    for arm in ("joint", "solo"):
        expected, exported = (
            load_file(tmp_path / run / "arms" / arm / "saes" / "primary" / "sae_weights.safetensors") for run in ("ddp", "divided")
        )
        for name, value in expected.items():
            assert (exported[name] - value).norm() <= 1e-5 * value.norm(), (arm, name)
    last = tmp_path / "divided" / "checkpoints" / "tokens=12288.ckpt"
    part = next(last.glob("__1_*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    stderr = fit(tmp_path / "on", *sharded_options(2, *arms), "--ckpt_path", str(last), rc=2)
    assert "is damaged (its part __1_0.distcp is not what was written)" in stderr


def test_an_incomplete_checkpoint_folder_is_skipped(tmp_path: Path):
    for number in (1, 2):
        draft = tmp_path / f".tokens={number}.ckpt.draft"
        write_parts(draft, {"state_dict": {"weights": torch.full((4,), float(number))}})
        (draft / "__1_0.distcp").write_bytes(b"\2\1" * 50)
        assert set(part_checksums(draft, 0)) == {"__0_0.distcp", ".metadata", "meta.pt"} and set(part_checksums(draft, 1)) == {
            "__1_0.distcp"
        }
        write_checksums(draft, {**part_checksums(draft, 0), **part_checksums(draft, 1)})
        atomic_files.replace(draft, tmp_path / f"tokens={number}.ckpt")
        os.utime(tmp_path / f"tokens={number}.ckpt", ns=(number, number))
    assert newest_intact([tmp_path]) == (tmp_path / "tokens=2.ckpt", {})
    damaged_part = tmp_path / "tokens=2.ckpt" / "__1_0.distcp"
    for content in (b"\2\1" * 49, b"\2\1" * 49 + b"\2\2", None):
        damaged_part.unlink() if content is None else damaged_part.write_bytes(content)
        os.utime(tmp_path / "tokens=2.ckpt", ns=(2, 2))
        assert newest_intact([tmp_path])[0] == tmp_path / "tokens=1.ckpt"
    (tmp_path / ".tokens=3.ckpt.draft").mkdir()  # a draft of a process that ended
    os.utime(tmp_path / "tokens=2.ckpt", ns=(2, 2))
    link_and_prune(tmp_path / "tokens=2.ckpt", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "tokens=2.ckpt"]


def test_a_checkpoint_folder_that_cannot_be_replaced_is_unchanged(tmp_path: Path):
    (tmp_path / "a.ckpt").mkdir()
    (tmp_path / "a.ckpt" / "part").write_text("as it was")
    with pytest.raises(FileNotFoundError):
        atomic_files.replace(tmp_path / "draft that is gone", tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"] and (tmp_path / "a.ckpt" / "part").read_text() == "as it was"


class Mesh:
    def __init__(self, size: int) -> None:
        self.count = size

    def size(self) -> int:
        return self.count


def test_saes_that_cannot_be_sharded_are_refused():
    joint = JointSAE(config("batchtopk", d_sae=50))
    with pytest.raises(InputError, match=r"primary\.d_sae must be a multiple of the 4 ranks that divide it, got 50"):
        joint.primary.divide(Mesh(4))
    for module in (JointSAE(config("gated")), JointSAE(config("batchtopk"), kernels="dense")):
        for size in (1, 2):  # one rank has all latents, but not in SAELens's format
            with pytest.raises(InputError, match="latents are divided by the sparse kernels alone"):
                module.primary.divide(Mesh(size))


def test_mesh_sizes_whose_product_is_not_the_number_of_ranks_are_refused(tmp_path: Path):
    mesh = {"class_path": "metasae_lightning.strategy.Sharded", "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 2}}
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": mesh}}))
    stderr = fit(tmp_path / "run", "-c", str(tmp_path / "mesh.yaml"), "--trainer.devices", "2", rc=2)
    assert (
        "error: trainer.strategy: The sizes data_parallel_size=2 and tensor_parallel_size=2 multiplied should equal the world size (2)"
        in stderr
    )

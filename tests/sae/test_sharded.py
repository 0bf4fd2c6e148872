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
from metasae_lightning.training.checkpoint_files import (
    find_damage,
    link_and_prune,
    merge_parts,
    newest_intact,
    part_checksums,
    write_checksums,
)
from tests.helpers.architectures import config
from tests.helpers.command_line import CommandLine

ROOT = Path(__file__).parents[2]
SIZES = {"tokens": 16_384, "batch_size": 256, "validation_tokens": 2048}


def fit(run: Path, *more: str, callbacks: list[Any] = [{"class_path": "Export"}], rc: int = 0) -> str:  # noqa: B006
    overlay = run.with_suffix(".yaml")
    often = {"class_path": "Checkpoints", "init_args": {"every_tokens": 4096, "keep": 4}}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [*callbacks, often]}}))
    sizes = [f"--data.init_args.{name}={value}" for name, value in SIZES.items()]
    command = CommandLine(["fit", "-c", "synthetic", "-c", str(overlay), "--run", str(run), *sizes, *more], cwd=ROOT)
    _, printed = command.communicate()
    assert command.returncode == rc, printed[-3000:]
    return printed


def divided(ranks: int, *more: str) -> list[str]:
    return ["--trainer.devices", str(ranks), "--trainer.strategy", "sharded", *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = [(role, load_file(run / "saes" / role / "sae_weights.safetensors")) for role in ("primary", "meta")]
    return {f"{role} {key}": value for role, state in found for key, value in state.items()}


def begun(run: Path, checkpoint: Path, *more: str) -> dict[str, torch.Tensor]:
    """The state of a resumed run before its first step."""
    fit(
        run,
        *more,
        "--ckpt_path",
        str(checkpoint),
        callbacks=[{"class_path": "tests.helpers.kept.SaveStartState", "init_args": {"path": f"{run}.pt"}}],
    )
    return torch.load(f"{run}.pt")


def test_a_checkpoint_of_four_ranks_is_resumed_on_two_and_on_one(tmp_path: Path):
    fit(tmp_path / "four", *divided(4))
    middle = tmp_path / "four" / "checkpoints" / "tokens=8192.ckpt"
    assert len(list(middle.glob("*.distcp"))) == 4 and find_damage(middle) is None
    two, one = begun(tmp_path / "two", middle, *divided(2)), begun(tmp_path / "one", middle)
    every = begun(tmp_path / "every", middle, "--trainer.devices", "2", "--trainer.strategy", "ddp")
    whole = merge_parts(middle)
    states = [{**whole["state_dict"]}, two, one, every]
    for found in states[1:]:
        assert found.keys() == one.keys() and all(torch.equal(found[name], one[name]) for name in one)
        assert all(torch.equal(found[name], value) for name, value in states[0].items())
    assert one["primary.sae.W_enc exp_avg"].count_nonzero() > 0 and one["primary.steps"] == 8

    # Four ranks that shard latents and rows otherwise reach the same state, and export one SAE folder.
    mesh = {"class_path": "metasae_lightning.strategy.Sharded", "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 2}}
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": mesh}}))
    fit(tmp_path / "square", "-c", str(tmp_path / "mesh.yaml"), "--trainer.devices", "4", "--ckpt_path", str(middle))
    expected, found = weights(tmp_path / "four"), weights(tmp_path / "square")
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name
    sae: Any = load_pretrained(tmp_path / "four" / "saes" / "primary")
    assert sae.W_dec.shape == (256, 64)


def test_an_unsharded_checkpoint_is_sharded_when_loaded_also_for_arms(tmp_path: Path):
    arms = ["--arms", yaml.safe_dump({"joint": {}, "solo": {"meta": None, "penalties": {}}}, default_flow_style=True).strip()]
    plain = ["--trainer.devices", "2", "--trainer.strategy", "ddp", *arms]
    fit(tmp_path / "ddp", *plain)
    middle = tmp_path / "ddp" / "checkpoints" / "tokens=8192.ckpt"
    fit(tmp_path / "divided", *divided(2, *arms), "--ckpt_path", str(middle))
    for arm in ("joint", "solo"):
        expected, found = (
            load_file(tmp_path / run / "arms" / arm / "saes" / "primary" / "sae_weights.safetensors") for run in ("ddp", "divided")
        )
        for name, value in expected.items():
            assert (found[name] - value).norm() <= 1e-5 * value.norm(), (arm, name)
    last = tmp_path / "divided" / "checkpoints" / "tokens=12288.ckpt"
    part = next(last.glob("__1_*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    told = fit(tmp_path / "on", *divided(2, *arms), "--ckpt_path", str(last), rc=2)
    assert "is damaged (its part __1_0.distcp is not what was written)" in told


def test_an_incomplete_checkpoint_folder_is_passed_over(tmp_path: Path):
    for number in (1, 2):
        draft = tmp_path / f".tokens={number}.ckpt.draft"
        draft.mkdir()
        for rank in (0, 1):
            (draft / f"__{rank}_0.distcp").write_bytes(bytes([number, rank]) * 50)
        (draft / ".metadata").write_bytes(b"where what is")
        assert set(part_checksums(draft, 0)) == {"__0_0.distcp", ".metadata"} and set(part_checksums(draft, 1)) == {"__1_0.distcp"}
        write_checksums(draft, {**part_checksums(draft, 0), **part_checksums(draft, 1)})
        atomic_files.replace(draft, tmp_path / f"tokens={number}.ckpt")
        os.utime(tmp_path / f"tokens={number}.ckpt", ns=(number, number))
    assert newest_intact([tmp_path]) == (tmp_path / "tokens=2.ckpt", {})
    torn = tmp_path / "tokens=2.ckpt" / "__1_0.distcp"
    for bad in (b"\2\1" * 49, b"\2\1" * 49 + b"\2\2", None):
        torn.unlink() if bad is None else torn.write_bytes(bad)
        os.utime(tmp_path / "tokens=2.ckpt", ns=(2, 2))
        assert newest_intact([tmp_path])[0] == tmp_path / "tokens=1.ckpt"
    (tmp_path / ".tokens=3.ckpt.draft").mkdir()  # of a process that ended
    os.utime(tmp_path / "tokens=2.ckpt", ns=(2, 2))
    link_and_prune(tmp_path / "tokens=2.ckpt", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "tokens=2.ckpt"]


def test_a_checkpoint_folder_that_cannot_be_replaced_keeps_its_name(tmp_path: Path):
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
    for odd in (JointSAE(config("gated")), JointSAE(config("batchtopk"), kernels="dense")):
        for size in (1, 2):  # alone it would have all latents, and still not as SAELens knows them
            with pytest.raises(InputError, match="latents are divided by the sparse kernels alone"):
                odd.primary.divide(Mesh(size))


def test_mesh_sizes_whose_product_is_not_the_number_of_ranks_are_refused(tmp_path: Path):
    mesh = {"class_path": "metasae_lightning.strategy.Sharded", "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 2}}
    (tmp_path / "mesh.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": mesh}}))
    told = fit(tmp_path / "run", "-c", str(tmp_path / "mesh.yaml"), "--trainer.devices", "2", rc=2)
    assert (
        "error: trainer.strategy: The sizes data_parallel_size=2 and tensor_parallel_size=2 multiplied should equal the world size (2)"
        in told
    )

"""A run that becomes NaN stops with a line, and what was good on the disk is still there."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sae_lens import SAE
from torch import Tensor
from torch.optim import SGD

from metasae_lightning.callbacks import StopOnNaN
from metasae_lightning.cli import main
from metasae_lightning.cli.recipes import RECIPES
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability, Penalty
from metasae_lightning.sae.nonfinite import first_nonfinite
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import ARCHITECTURES, activations, config

pytestmark = [
    # lightning 2.6 advises on checkpoints under manual optimisation, for which a joint step has no use: callbacks/model_checkpoint.py
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    # And warns of going on without the callback that wrote the checkpoint, as is done here.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Batches:
    """Ten of them; Lightning takes a list for a list of loaders."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        return map(activations, range(10))


class Poison(Callback):
    """A batch of NaN at a step; what the run's folder held before is remembered."""

    before: dict[Path, bytes]

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            Poison.before = contents(Path(trainer.default_root_dir))
            Batch.of(batch).activations.fill_(torch.nan)


class PoisonAtSaving(Callback):
    """NaN in a parameter between the step's end and the checkpoint, from a step on."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.at:
            with torch.no_grad():
                pl_module.primary.sae.b_enc[3] = torch.nan


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for part in ("checkpoints", "saes") for path in (run / part).rglob("*") if path.is_file()}


def joint(**changes: Any) -> JointSAE:
    return JointSAE(
        config("batchtopk"), config("topk", d_sae=8), **{"penalties": {"d": Decomposability(0.3)}, "n_p": 3, "n_m": 2, **changes}
    )


def fitted(folder: Path, *callbacks: Callback, module: JointSAE | None = None, **more: Any) -> JointSAE:
    module = joint() if module is None else module
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": saves, **QUIET}
    Trainer(**options, callbacks=list(callbacks)).fit(module, Batches(), **more)
    return module


def saver(folder: Path, **how: Any) -> ModelCheckpoint:
    """After every step."""
    return ModelCheckpoint(folder / "checkpoints", **{"every_n_train_steps": 1, "save_last": "link", "save_top_k": 1, **how})


def finite(checkpoint: Path) -> bool:
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    return all(bool(value.isfinite().all()) for value in state.values())


def recipe(folder: Path, *callbacks: dict[str, Any]) -> list[str]:
    """The synthetic recipe, short, checkpointing after a validation every five batches and exporting every third."""
    save = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": "link", "save_top_k": 1}}
    export = {"class_path": "Export", "init_args": {"every_tokens": 3 * 1024}}
    watched = [*callbacks, {"class_path": "HeldOut"}, export, {"class_path": "Summary"}, save]
    (folder / "overlay.yaml").write_text(yaml.safe_dump({"trainer": {"val_check_interval": 5, "callbacks": watched}}))
    sizes = [
        "--data.init_args.tokens",
        str(20 * 1024),
        "--data.init_args.validation_tokens",
        "2048",
        "--data.init_args.test_tokens",
        "2048",
    ]
    return ["fit", "-c", "synthetic", "-c", str(folder / "overlay.yaml"), "--run", str(folder / "run"), *sizes]


STOP = {"class_path": "StopOnNaN"}
NAN_BATCH = {"class_path": "tests.callbacks.test_stop_on_nan.Poison", "init_args": {"at": 13}}


def test_a_nan_batch_stops_the_command_and_leaves_the_last_checkpoint_and_sae(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(recipe(tmp_path, STOP, NAN_BATCH)) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("metasae: error: ")]
    (good,) = (path for path in (tmp_path / "run" / "checkpoints").iterdir() if not path.is_symlink())
    assert len(lines) == 1 and len(lines[0]) < 500
    assert lines[0].startswith(
        "metasae: error: the primary's loss is not finite after 14,336 tokens; no checkpoint or SAE was written over"
    )
    assert f"the last good checkpoint is {good};" in lines[0] and "the activations of this batch are not finite either" in lines[0]

    # 13 batches are two checkpoints, of which one is left, with its link, and four exports of two SAEs.
    kept = {path.relative_to(tmp_path / "run").as_posix() for path in Poison.before}
    assert {"checkpoints/last.ckpt", "saes/primary/cfg.json", "saes/meta/cfg.json"} < kept and len(list(good.parent.iterdir())) == 2
    assert contents(tmp_path / "run") == Poison.before
    assert finite(good) and int(torch.load(good, weights_only=False)["state_dict"]["primary.steps"]) == 10
    for role in ("primary", "meta"):
        assert all(value.isfinite().all() for value in SAE.load_from_disk(tmp_path / "run" / "saes" / role).state_dict().values())
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert main(["test", "-c", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", str(good.with_name("last.ckpt"))]) == 0


# The control.
def test_without_it_they_are_written_over(tmp_path: Path):
    checkpoints = saver(tmp_path)
    fitted(tmp_path, PoisonAtSaving(6), checkpoints)
    assert not finite(Path(checkpoints.best_model_path)) and len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("how", [{}, {"save_last": None}, {"save_last": True}, {"save_top_k": -1}, {"filename": "one"}], ids=str)
def test_a_bad_state_is_refused_before_the_good_checkpoint_goes(tmp_path: Path, how: dict[str, Any]):
    with pytest.raises(InputError, match=r"primary\.sae\.b_enc is not finite after 448 tokens.* lower learning rate") as stopped:
        fitted(tmp_path, StopOnNaN(), PoisonAtSaving(6), saver(tmp_path, **how))
    left = list((tmp_path / "checkpoints").iterdir())
    assert left and all(map(finite, left))
    (named,) = (path for path in left if f"the last good checkpoint is {path};" in str(stopped.value))
    resumed = fitted(tmp_path, module=joint(), ckpt_path=named)
    assert int(torch.load(named, weights_only=False)["state_dict"]["primary.steps"]) == 6
    assert int(resumed.primary.steps) == 10 and first_nonfinite(resumed.state_dict()) is None


# Such a checkpoint asks no callback.
def test_weights_alone_are_guarded_at_validation(tmp_path: Path):
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_weights_only=True)
    with pytest.raises(InputError, match="b_enc is not finite"):
        fitted(tmp_path, StopOnNaN(every=1000), PoisonAtSaving(9), checkpoints, val_dataloaders=Batches())
    assert not (tmp_path / "checkpoints").exists()


class Infinite(Penalty):
    """Finite until a step."""

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        return W_dec.square().mean() / (0.0 if step == 4 else 1.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"penalties": {"own": Infinite(0.1)}}, r"^penalty own is not finite after 320 tokens"),
        ({"primary_optimizer": lambda p: SGD(p, lr=1e38)}, r"^(primary\.sae\.\w+|the primary's loss) is not finite after (64|128) tokens"),
        ({"meta_optimizer": lambda p: SGD(p, lr=1e38)}, r"^(meta\.sae\.\w+|the meta SAE's loss) is not finite after 192 tokens"),
    ],
    ids=["penalty", "primary diverges", "meta diverges"],
)
def test_what_broke_is_named(changes: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(InputError, match=says) as stopped:
        fitted(tmp_path, StopOnNaN(), module=joint(**changes))
    assert "there is no checkpoint before it; a lower learning rate or clip_grad_norm" in str(stopped.value)


def test_it_looks_so_often_and_at_the_last_step(tmp_path: Path):
    for every, at, tokens in ((4, 1, 256), (4, 4, 512), (4, 9, 640), (1, 9, 640)):
        with pytest.raises(InputError, match=f"after {tokens} tokens"):
            fitted(tmp_path, StopOnNaN(every), Poison(at))
    with pytest.raises(InputError, match="every must be at least 1, got 0"):
        StopOnNaN(0)


def test_the_checkpoint_a_run_went_on_from_is_the_last_good_one(tmp_path: Path):
    fitted(tmp_path, saver(tmp_path, every_n_train_steps=None))
    (start,) = (path for path in (tmp_path / "checkpoints").iterdir() if not path.is_symlink())
    run = Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, callbacks=[StopOnNaN(), Poison(2)], enable_checkpointing=False, **QUIET
    )
    with pytest.raises(InputError, match=f"after 832 tokens.* the last good checkpoint is {start}"):
        run.fit(joint(), Batches(), ckpt_path=start)


def test_all_ranks_stop_where_another_one_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce_boolean_decision", lambda self, decision, all=True: False)
    with pytest.raises(InputError, match="a tensor on another rank is not finite after 64 tokens"):
        fitted(tmp_path, StopOnNaN())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_is_stopped_without_cause_or_changed(name: str, tmp_path: Path):
    watched, alone = (
        fitted(tmp_path / str(i), *callbacks, module=JointSAE(config(name)))
        for i, callbacks in enumerate([(StopOnNaN(), saver(tmp_path)), ()])
    )
    assert all(torch.equal(value, alone.state_dict()[key]) for key, value in watched.state_dict().items())


def test_large_is_not_infinite():
    large = torch.full((4,), 3e38)
    assert not large.sum().isfinite() and first_nonfinite({"a": large, "b": torch.tensor([1e300], dtype=torch.float64)}) is None
    assert first_nonfinite({"count": torch.tensor(3), "a": large, "b": torch.tensor([torch.inf])}) == "b"


@pytest.mark.parametrize("name", ["quickstart", "synthetic", "gpt2_large_l20", "gemma2_9b_l23"])
def test_a_recipe_looks_before_it_writes(name: str):
    callbacks = [entry["class_path"] for entry in yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["trainer"]["callbacks"]]
    ours = [entry for entry in callbacks if "." not in entry]
    assert ours[0] == "StopOnNaN" and ours[-2:] == ["Summary", "Checkpoints"] and callbacks == ours

"""StopOnNaN ends a run with one line before a checkpoint or an SAE on disk is overwritten."""

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

from metasae_lightning.callbacks import Export, StopOnNaN
from metasae_lightning.cli import main
from metasae_lightning.cli.recipes import RECIPES
from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability, Penalty
from metasae_lightning.sae.nonfinite import first_nonfinite
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import ARCHITECTURES, activations, config

pytestmark = [
    # lightning 2.6 advises on checkpoints under manual optimisation, for which a joint step has no use: callbacks/model_checkpoint.py
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    # Lightning warns of resuming without the callback that wrote the checkpoint, which these tests do.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


class Batches:
    """Ten batches of activations. A class, since Lightning takes a list to be a list of loaders."""

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Any:
        return map(activations, range(10))


class Poison(Callback):
    """Fills the batch of one step with NaN, and stores the run's files as they were before."""

    before: dict[Path, bytes]

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            Poison.before = contents(Path(trainer.default_root_dir))
            Batch.of(batch).activations.fill_(torch.nan)


class PoisonAtSaving(Callback):
    """From a step on, writes NaN into a parameter between the end of the step and the checkpoint."""

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


def fit_joint(folder: Path, *callbacks: Callback, module: JointSAE | None = None, **fit_args: Any) -> JointSAE:
    module = joint() if module is None else module
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": saves, **QUIET}
    Trainer(**options, callbacks=list(callbacks)).fit(module, Batches(), **fit_args)
    return module


def checkpoint_every_step(folder: Path, **changes: Any) -> ModelCheckpoint:
    """A ModelCheckpoint that saves after every step and keeps the newest."""
    return ModelCheckpoint(folder / "checkpoints", **{"every_n_train_steps": 1, "save_last": "link", "save_top_k": 1, **changes})


def is_finite(checkpoint: Path) -> bool:
    state = torch.load(checkpoint, weights_only=False)["state_dict"]
    return all(bool(value.isfinite().all()) for value in state.values())


def short_recipe_args(folder: Path, *callbacks: dict[str, Any]) -> list[str]:
    """Arguments of a short synthetic run that validates and checkpoints every five batches and exports every third."""
    save = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_last": "link", "save_top_k": 1}}
    export = {"class_path": "Export", "init_args": {"every_tokens": 3 * 1024}}
    all_callbacks = [*callbacks, {"class_path": "HeldOut"}, export, {"class_path": "Summary"}, save]
    (folder / "overlay.yaml").write_text(yaml.safe_dump({"trainer": {"val_check_interval": 5, "callbacks": all_callbacks}}))
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
    assert main(short_recipe_args(tmp_path, STOP, NAN_BATCH)) == 2
    lines = [line for line in capsys.readouterr().err.split("\n") if line.startswith("metasae: error: ")]
    (good,) = (path for path in (tmp_path / "run" / "checkpoints").iterdir() if not path.is_symlink())
    assert len(lines) == 1 and len(lines[0]) < 500
    assert lines[0].startswith(
        "metasae: error: the primary's loss is not finite after 14,336 tokens; no checkpoint or SAE was written over"
    )
    assert f"the last good checkpoint is {good};" in lines[0] and "the activations of this batch are not finite either" in lines[0]

    # 13 batches give two checkpoints, of which the newer is left with its link, and four exports of two SAEs.
    files_before = {path.relative_to(tmp_path / "run").as_posix() for path in Poison.before}
    assert {"checkpoints/last.ckpt", "saes/primary/cfg.json", "saes/meta/cfg.json"} < files_before and len(list(good.parent.iterdir())) == 2
    assert contents(tmp_path / "run") == Poison.before
    assert is_finite(good) and int(torch.load(good, weights_only=False)["state_dict"]["primary.steps"]) == 10
    for role in ("primary", "meta"):
        assert all(value.isfinite().all() for value in SAE.load_from_disk(tmp_path / "run" / "saes" / role).state_dict().values())
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert main(["test", "-c", str(tmp_path / "run" / "config.yaml"), "--ckpt_path", str(good.with_name("last.ckpt"))]) == 0


# Control.
def test_without_stop_on_nan_a_bad_state_overwrites_the_checkpoint(tmp_path: Path):
    checkpoints = checkpoint_every_step(tmp_path)
    fit_joint(tmp_path, PoisonAtSaving(6), checkpoints)
    assert not is_finite(Path(checkpoints.best_model_path)) and len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize("saver_args", [{}, {"save_last": None}, {"save_last": True}, {"save_top_k": -1}, {"filename": "one"}], ids=str)
def test_a_bad_state_stops_the_run_before_the_good_checkpoint_is_removed(tmp_path: Path, saver_args: dict[str, Any]):
    with pytest.raises(InputError, match=r"primary\.sae\.b_enc is not finite after 448 tokens.* lower learning rate") as error:
        fit_joint(tmp_path, StopOnNaN(), PoisonAtSaving(6), checkpoint_every_step(tmp_path, **saver_args))
    remaining = list((tmp_path / "checkpoints").iterdir())
    assert remaining and all(map(is_finite, remaining))
    (named_checkpoint,) = (path for path in remaining if f"the last good checkpoint is {path};" in str(error.value))
    resumed = fit_joint(tmp_path, module=joint(), ckpt_path=named_checkpoint)
    assert int(torch.load(named_checkpoint, weights_only=False)["state_dict"]["primary.steps"]) == 6
    assert int(resumed.primary.steps) == 10 and first_nonfinite(resumed.state_dict()) is None


# Lightning does not call on_save_checkpoint of callbacks where save_weights_only is set.
def test_a_weights_only_checkpoint_of_a_bad_state_is_prevented_at_validation(tmp_path: Path):
    checkpoints = ModelCheckpoint(tmp_path / "checkpoints", save_weights_only=True)
    with pytest.raises(InputError, match="b_enc is not finite"):
        fit_joint(tmp_path, StopOnNaN(every=1000), PoisonAtSaving(9), checkpoints, val_dataloaders=Batches())
    assert not (tmp_path / "checkpoints").exists()


class InfiniteAtStep4(Penalty):
    """A penalty that is infinite at step 4."""

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        return W_dec.square().mean() / (0.0 if step == 4 else 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalties": {"own": InfiniteAtStep4(0.1)}}, r"^penalty own is not finite after 320 tokens"),
        ({"primary_optimizer": lambda p: SGD(p, lr=1e38)}, r"^(primary\.sae\.\w+|the primary's loss) is not finite after (64|128) tokens"),
        ({"meta_optimizer": lambda p: SGD(p, lr=1e38)}, r"^(meta\.sae\.\w+|the meta SAE's loss) is not finite after 192 tokens"),
    ],
    ids=["penalty", "primary diverges", "meta diverges"],
)
def test_the_error_names_the_first_nonfinite_tensor(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message) as error:
        fit_joint(tmp_path, StopOnNaN(), module=joint(**changes))
    assert "there is no checkpoint before it; a lower learning rate or clip_grad_norm" in str(error.value)


def test_every_sets_the_interval_of_checks_and_the_last_step_is_always_checked(tmp_path: Path):
    for every, at, tokens in ((4, 1, 256), (4, 4, 512), (4, 9, 640), (1, 9, 640)):
        with pytest.raises(InputError, match=f"after {tokens} tokens"):
            fit_joint(tmp_path, StopOnNaN(every), Poison(at))
    with pytest.raises(InputError, match="every must be at least 1, got 0"):
        StopOnNaN(0)


def test_on_a_gpu_the_logged_steps_are_checked_and_an_export_between_them_is_refused(tmp_path: Path):
    logged = "metasae_lightning.callbacks.stop_on_nan.is_logged"
    with dry_run_scale(1.0, gpu=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logged, lambda trainer: trainer.fit_loop.epoch_loop.batch_idx in (0, 7))
        with pytest.raises(InputError, match="after 512 tokens"):
            fit_joint(tmp_path, StopOnNaN(), Poison(1))
        assert not contents(tmp_path)
        with pytest.raises(InputError, match=r"primary\.sae\.\w+ is not finite after 320 tokens; no SAE was written over"):
            fit_joint(tmp_path, StopOnNaN(), Poison(3), Export(every_tokens=5 * 64))
        assert not contents(tmp_path)


def test_the_error_names_the_checkpoint_that_the_run_resumed_from(tmp_path: Path):
    fit_joint(tmp_path, checkpoint_every_step(tmp_path, every_n_train_steps=None))
    (start,) = (path for path in (tmp_path / "checkpoints").iterdir() if not path.is_symlink())
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, callbacks=[StopOnNaN(), Poison(2)], enable_checkpointing=False, **QUIET
    )
    with pytest.raises(InputError, match=f"after 832 tokens.* the last good checkpoint is {start}"):
        trainer.fit(joint(), Batches(), ckpt_path=start)


def test_a_rank_stops_if_another_rank_has_a_nonfinite_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.reduce_boolean_decision", lambda self, decision, all=True: False)
    with pytest.raises(InputError, match="a tensor on another rank is not finite after 64 tokens"):
        fit_joint(tmp_path, StopOnNaN())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stop_on_nan_changes_no_architecture_and_stops_none_that_is_finite(name: str, tmp_path: Path):
    monitored, unmonitored = (
        fit_joint(tmp_path / str(i), *callbacks, module=JointSAE(config(name)))
        for i, callbacks in enumerate([(StopOnNaN(), checkpoint_every_step(tmp_path)), ()])
    )
    assert all(torch.equal(value, unmonitored.state_dict()[key]) for key, value in monitored.state_dict().items())


def test_large_finite_tensors_with_an_infinite_sum_count_as_finite():
    large = torch.full((4,), 3e38)
    assert not large.sum().isfinite() and first_nonfinite({"a": large, "b": torch.tensor([1e300], dtype=torch.float64)}) is None
    assert first_nonfinite({"count": torch.tensor(3), "a": large, "b": torch.tensor([torch.inf])}) == "b"


@pytest.mark.parametrize("name", ["quickstart", "synthetic", "gpt2_large_l20", "gemma2_9b_l23"])
def test_recipes_have_stop_on_nan_first_and_summary_and_checkpoints_last(name: str):
    callbacks = [entry["class_path"] for entry in yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["trainer"]["callbacks"]]
    own_callbacks = [entry for entry in callbacks if "." not in entry]
    assert own_callbacks[0] == "StopOnNaN" and own_callbacks[-2:] == ["Summary", "Checkpoints"] and callbacks == own_callbacks

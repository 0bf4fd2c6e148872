"""An arm of `SideBySide` is bit-equal to the same SAE trained alone, whatever the other arms are."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from sae_lens import SAE
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Adam

from metasae_lightning import JointSAE, SideBySide, SyntheticDataModule
from metasae_lightning.callbacks import Export, HeldOut, StopOnNaN, Summary
from metasae_lightning.cli import main
from metasae_lightning.cli.grid import expand
from metasae_lightning.data.synthetic import SyntheticModelConfig
from metasae_lightning.errors import InputError
from metasae_lightning.memory.plan import memory_plan
from metasae_lightning.penalties import Decomposability, Orthogonality, Penalty
from metasae_lightning.training.arm_callbacks import EachArm, Observer
from tests.helpers.architectures import D_IN, Batches, config

pytestmark = [
    # lightning 2.6 advises on checkpoints under manual optimisation, for which a joint step has no use: callbacks/model_checkpoint.py
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    # Batches are functions of their number, and a resumed run gets the remaining ones.
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended:UserWarning"),
]
QUIET: dict[str, Any] = {
    **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0},
    **{"enable_progress_bar": False, "enable_model_summary": False},
}


def joint(primary: str = "batchtopk", *, d_sae: int = 48, weight: float = 0.3, sigma_sq: float = 1.0, **more: Any) -> JointSAE:
    settings: dict[str, Any] = {"n_p": 4, "n_m": 2, "dead_after_tokens": 256}
    penalties = {"d": Decomposability(weight, sigma_sq)}
    return JointSAE(config(primary, d_sae), config("batchtopk", 12), penalties, **{**settings, **more})


def solo(**more: Any) -> JointSAE:
    return JointSAE(config("batchtopk"), None, {}, dead_after_tokens=256, **more)


# Arms that differ in penalty, architecture, width, seed and normaliser.
NINE_ARMS: dict[str, Callable[[], JointSAE]] = {
    "joint": joint,
    "solo": solo,
    "control": lambda: joint(weight=0.0),
    "weight1.0": lambda: joint(weight=1.0),
    "sigma_sq0.3-seed1": lambda: joint(sigma_sq=0.3, seed=1),
    "orthogonality": lambda: JointSAE(config("batchtopk"), None, {"o": Orthogonality(0.25, chunk_size=16)}),
    "matryoshka": lambda: joint("matryoshka_batchtopk", b_dec_init="mean"),
    "jumprelu": lambda: joint("jumprelu", meta_rows=20),
    # A high learning rate, so that cached supports differ from recomputed ones and a checkpoint must hold them.
    "wide": lambda: joint("topk", d_sae=96, critic_supports="macro_step", primary_optimizer=lambda ps: Adam(ps, lr=0.05)),
}


def fit_module(module: Any, folder: Path, *, batches: int = 100, callbacks: Any = (), checkpoint: Path | None = None) -> Any:
    trainer = Trainer(**QUIET, default_root_dir=folder, callbacks=list(callbacks), enable_checkpointing=False)
    trainer.fit(module, Batches(batches), Batches(2, 1000), ckpt_path=checkpoint, weights_only=False)
    return module


def assert_equal(first: JointSAE, second: JointSAE) -> None:
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_an_arm_among_nine_in_any_order_is_bit_equal_to_the_arm_alone(tmp_path: Path):
    alone = {name: fit_module(make(), tmp_path) for name, make in NINE_ARMS.items()}
    all_arms = fit_module(SideBySide({name: make() for name, make in NINE_ARMS.items()}), tmp_path)
    three_names = ["wide", "control", "joint"]
    three_arms = fit_module(SideBySide({name: NINE_ARMS[name]() for name in three_names}), tmp_path)
    for name, arm in alone.items():
        assert int(arm.primary.steps) == 100
        assert_equal(arm, all_arms.arms[name])
        assert name not in three_names or torch.equal(arm.primary.W_dec, three_arms.arms[name].primary.W_dec)
    # Control: arms that differ in a penalty's weight or in a seed have different weights.
    rows = {name: arm.primary.W_dec for name, arm in alone.items() if arm.primary.W_dec.shape[0] == 48}
    assert torch.equal(rows.pop("control"), rows["solo"])
    assert all(not torch.equal(rows[a], rows[b]) for a in rows for b in rows if a < b)


class StepRecorder(Observer):
    """Records the arm, decoder size and width of codes of each step; counts its own steps."""

    steps: list[tuple[str, int, Any]]

    def __init__(self) -> None:
        self.n_steps = 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.n_steps += 1
        pl_module.log("n_steps", float(self.n_steps))
        StepRecorder.steps.append((Path(trainer.default_root_dir).name, pl_module.primary.W_dec.shape[0], outputs["output"].codes.shape[1]))

    def state_dict(self) -> dict[str, Any]:
        return {"n_steps": self.n_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.n_steps = state_dict["n_steps"]


def test_a_callback_gets_an_arm_as_if_it_were_trained_alone(tmp_path: Path):
    StepRecorder.steps = []
    module = SideBySide({"a": joint(), "b": joint("topk", d_sae=96)})
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[StepRecorder(), HeldOut()], enable_checkpointing=False)
    trainer.fit(module, Batches(3), Batches(2, 1000))
    assert StepRecorder.steps == [("a", 48, 48), ("b", 96, 96)] * 3
    alone = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[HeldOut()], enable_checkpointing=False)
    alone.fit(joint(), Batches(3), Batches(2, 1000))
    figures = {name.removeprefix("a/"): value for name, value in trainer.callback_metrics.items() if name.startswith("a/")}
    assert figures.pop("n_steps") == 3
    assert figures.keys() == alone.callback_metrics.keys() and {"val/fvu", "train/loss", "penalty/d"} <= figures.keys()
    assert all(torch.equal(value, alone.callback_metrics[name]) for name, value in figures.items())
    each_arm = [callback for callback in trainer.callbacks if isinstance(callback, EachArm)]  # type: ignore[attr-defined]
    assert len(each_arm) == 1 and [type(copy) for copy in each_arm[0].copies["a"]] == [StepRecorder, HeldOut]


class ModifyingObserver(Observer):
    """Does what an observer may do: logs, sets an attribute, stops its arm, adds to the checkpoint."""

    loaded: list[Any]

    def __init__(self) -> None:
        self.gradients = 0

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self.gradients += 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert torch.equal(outputs["loss"], outputs["output"].loss)
        assert pl_module.trainer is trainer and trainer.lightning_module.primary is pl_module.primary
        assert len(trainer.optimizers) == (1 if pl_module.meta is None else 2)
        self.log("gradients", float(self.gradients))
        pl_module.n_m = 3
        if pl_module.meta is None and batch_idx == 1:
            trainer.should_stop = True

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["own"] = min(checkpoint["state_dict"]), pl_module.primary.W_dec.shape[0]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        ModifyingObserver.loaded.append((checkpoint["own"], len(checkpoint["state_dict"])))


def test_a_callback_changes_its_own_arm_only(tmp_path: Path):
    ModifyingObserver.loaded, StepRecorder.steps = [], []

    def arms() -> SideBySide:
        return SideBySide({"a": joint(), "b": joint("topk", d_sae=96), "c": solo()})

    module = arms()
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[ModifyingObserver()], enable_checkpointing=False)
    with pytest.warns(UserWarning, match="the arm c has stopped, and a, b go on: an observer asked for it"):
        trainer.fit(module, Batches(4), Batches(1, 1000))
    # Four primary steps, each with a backward pass of the loss and of the penalty, then the 3 meta steps that the observer set.
    assert [trainer.callback_metrics[f"{name}/gradients"] for name in "abc"] == [11, 11, 2]
    assert [arm.n_m for arm in module.arms.values()] == [3, 3, 3]
    assert int(module.arms["c"].primary.steps) == 2 and module.arms["c"].trainer is trainer
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[ModifyingObserver(), StepRecorder()], enable_checkpointing=False)
    trainer.fit(arms(), Batches(4), Batches(1, 1000), ckpt_path=tmp_path / "kept.ckpt", weights_only=False)
    first = min(joint().state_dict())
    # The observer of c was not called on saving, since c had stopped.
    assert [own_entry for own_entry, _ in ModifyingObserver.loaded[:2]] == [(first, 48), (first, 96)]
    with pytest.raises(InputError, match="the trainer's callbacks belong to the arms a, b, c: take a new trainer"):
        trainer.fit(SideBySide({"d": joint()}), Batches(4), Batches(1, 1000))
    with pytest.raises(InputError, match=r"the checkpoint holds the arms a, b, c: go on with the recipe that has them"):
        fit_module(joint(), tmp_path, checkpoint=tmp_path / "kept.ckpt")


class NaNPenalty(Penalty):
    """A penalty that is 0 before a step and NaN from it on."""

    def __init__(self, at: int) -> None:
        super().__init__(1.0)
        self.at = at

    def forward(self, W_dec: Tensor, critic: Any = None, step: int = 0) -> Tensor:
        return W_dec.sum() * (torch.nan if step >= self.at else 0.0)


def test_an_arm_that_becomes_nan_stops_and_the_other_arms_continue(tmp_path: Path):
    def broken() -> JointSAE:
        return JointSAE(config("batchtopk"), None, {"burst": NaNPenalty(5)})

    save_checkpoints = ModelCheckpoint(dirpath=tmp_path, filename="kept", every_n_train_steps=8, save_top_k=-1)
    callbacks = [StopOnNaN(), Export(), Summary(), save_checkpoints]
    module = SideBySide({"joint": joint(), "broken": broken()})
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=callbacks)
    with pytest.warns(UserWarning, match=r"the arm broken has stopped, and joint go on: penalty burst is not finite after 384 tokens"):
        trainer.fit(module, Batches(20), Batches(2, 1000))
    assert int(module.arms["broken"].primary.steps) == 6
    assert_equal(module.arms["joint"], fit_module(joint(), tmp_path, batches=20))
    assert (tmp_path / "arms" / "joint" / "saes" / "primary").exists() and not (tmp_path / "arms" / "broken").exists()
    record = json.loads((tmp_path / "evaluation.json").read_text())["arms"]
    assert "burst is not finite" in record["broken"]["validation"]["stopped"] and record["joint"]["validation"]["tokens"] == 20 * 64
    # The arm stays stopped in a resumed run.
    resumed = SideBySide({"joint": joint(), "broken": broken()})
    fit_module(resumed, tmp_path, batches=20, callbacks=[StopOnNaN()], checkpoint=next(tmp_path.glob("kept*.ckpt")))
    assert int(resumed.arms["broken"].primary.steps) == 6 and list(resumed.stopped) == ["broken"]
    # The run ends when no arm is left.
    with pytest.raises(InputError, match=r"^one: penalty burst is not finite"):
        fit_module(SideBySide({"one": broken()}), tmp_path, batches=20, callbacks=[StopOnNaN()])


def test_a_resumed_run_with_arms_equals_an_uninterrupted_one(tmp_path: Path):
    def arms() -> SideBySide:
        return SideBySide({name: NINE_ARMS[name]() for name in ("joint", "solo", "wide", "weight1.0")})

    class SaveAtStep9(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 9:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    StepRecorder.steps = []
    uninterrupted = fit_module(arms(), tmp_path, batches=20, callbacks=[StepRecorder(), SaveAtStep9()])
    resumed, recorder = arms(), StepRecorder()
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[recorder], enable_checkpointing=False)
    trainer.fit(resumed, RemainingBatches(20, skip=10), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    for name, arm in uninterrupted.arms.items():
        assert_equal(arm, resumed.arms[name])
    assert trainer.callback_metrics["wide/n_steps"] == 20
    with pytest.raises(InputError, match=r"the checkpoint holds the arms joint, solo, wide, weight1\.0, and this run has joint"):
        fit_module(SideBySide({"joint": joint()}), tmp_path, batches=20, checkpoint=tmp_path / "half.ckpt")


class RemainingBatches(Batches):
    """`count` batches without the first `skip`, as a restored stream yields them."""

    def __init__(self, count: int, skip: int):
        super().__init__(count)
        self.skip = skip

    def __iter__(self) -> Any:
        self.numbers = range(self.skip, self.numbers.stop)
        return super().__iter__()

    def __len__(self) -> int:
        return 20


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "there is none"),
        (["a/b"], "has letters, digits"),
        (["train"], "may not be one of"),
        (["a.b", "a_b"], "differ in no more than a dot"),
        (["solo", "Solo"], "or capitals"),
        (["a" * 101], "100 letters at most"),
    ],
)
def test_invalid_arm_names_are_refused(names: list[str], message: str):
    with pytest.raises(InputError, match=message):
        SideBySide({name: solo() for name in names})


MODEL: dict[str, Any] = {
    "class_path": "JointSAE",
    "init_args": {
        "n_p": 10,
        "primary": {"init_args": {"d_sae": 8, "k": 2}},
        "penalties": {"d": {"init_args": {"weight": 0.3, "sigma_sq": 1.0}}},
    },
}


def test_a_grid_gives_all_combinations_and_sets_the_seed_of_every_arm():
    arms = {"solo": {"penalties": {}}, "wide": {"primary.init_args.d_sae": 16}}
    expanded = expand(MODEL, arms, {"weight": [0.1, 1.0], "sigma_sq": [0.3, 1.0, 3.0], "seed": [0, 1]})["init_args"]["arms"]
    assert len(expanded) == (2 + 6) * 2
    assert expanded["solo-seed1"]["init_args"] == {**MODEL["init_args"], "penalties": {}, "seed": 1}
    arm_args = expanded["weight1.0-sigma_sq3.0-seed0"]["init_args"]
    assert (
        arm_args["penalties"]["d"]["init_args"] == {"weight": 1.0, "sigma_sq": 3.0} and arm_args["primary"] == MODEL["init_args"]["primary"]
    )
    assert expanded["wide-seed0"]["init_args"]["primary"]["init_args"] == {"d_sae": 16, "k": 2}
    assert MODEL["init_args"]["primary"]["init_args"]["d_sae"] == 8
    assert list(expand(MODEL, arms, {}, only=["wide"])["init_args"]["arms"]) == ["wide"]
    # `penalties` is replaced before `weight`, a short name of one of its parts, is set.
    changes = {"weight": 0.5, "penalties": {"d": {"init_args": {"weight": 0.25}}}}
    assert expand(MODEL, {"a": changes}, {})["init_args"]["arms"]["a"]["init_args"]["penalties"]["d"]["init_args"]["weight"] == 0.5


@pytest.mark.parametrize(
    ("arms", "grid", "only", "message"),
    [
        ({}, {"weight": 0.3}, (), "grid.weight must be a list"),
        ({"a": {}}, {}, ("b",), "there is no arm 'b' among a"),
        ({"a": {"primry.k": 1}}, {}, (), "arms.a: the model has no primry that primry.k could be a part of"),
        ({"weight0.1": {}}, {"weight": [0.1]}, (), "'weight0.1' is there twice"),
        ({"a": {}}, {"seed": [0, 0]}, (), "one is there twice"),
    ],
)
def test_invalid_grids_are_refused(arms: Any, grid: Any, only: Any, message: str):
    with pytest.raises(InputError, match=message):
        expand(MODEL, arms, grid, only)


SMALL = ["--data.init_args.tokens", "12288", "--data.init_args.validation_tokens", "4096", "--data.init_args.test_tokens", "4096"]
ARMS = """
arms:
  solo: {meta: null, penalties: {}}
  control: {weight: 0.0}
grid:
  weight: [0.05]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arms")
    (folder / "arms.yaml").write_text(ARMS)
    assert main(["fit", "-c", "synthetic", "-c", str(folder / "arms.yaml"), "--run", str(folder / "run"), *SMALL]) == 0
    return folder / "run"


NAMES = ["solo", "control", "weight0.05"]


def test_a_run_with_arms_has_the_documented_folder(run: Path):
    for name in NAMES:
        assert isinstance(SAE.load_from_disk(run / "arms" / name / "saes" / "primary"), SAE)
        assert (run / "arms" / name / "saes" / "meta").exists() == (name != "solo")
        assert list((run / "tensorboard" / name).glob("events.*"))
    record = json.loads((run / "evaluation.json").read_text())
    assert list(record["arms"]) == NAMES
    assert record["arms"]["solo"]["validation"]["primary"] == record["arms"]["control"]["validation"]["primary"]
    assert record["arms"]["solo"]["validation"]["exported"]["primary"]["l0"] == pytest.approx(8, rel=0.02)
    columns = (run / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {f"{name}/{key}" for name in NAMES for key in ("train/loss", "val/fvu")} <= set(columns)


def test_an_arm_of_the_command_exports_the_saes_of_a_run_with_that_model_alone(run: Path, tmp_path: Path):
    alone = tmp_path / "alone"
    assert main(["fit", "-c", "synthetic", "--run", str(alone), *SMALL]) == 0
    for role in ("primary", "meta"):
        expected, exported = (
            load_file(folder / "saes" / role / "sae_weights.safetensors") for folder in (alone, run / "arms" / "weight0.05")
        )
        assert expected.keys() == exported.keys() and all(torch.equal(expected[key], exported[key]) for key in expected)


def test_the_saved_config_names_every_arm_and_reproduces_the_run(run: Path, tmp_path: Path):
    saved_config = yaml.safe_load((run / "config.yaml").read_text())
    assert saved_config["arms"] is None and saved_config["grid"] is None and list(saved_config["model"]["init_args"]["arms"]) == NAMES
    assert main(["fit", "-c", str(run / "config.yaml"), "--run", str(tmp_path / "again")]) == 0
    for name in NAMES:
        expected, exported = (
            load_file(folder / "arms" / name / "saes/primary/sae_weights.safetensors") for folder in (run, tmp_path / "again")
        )
        assert all(torch.equal(expected[key], exported[key]) for key in expected)


def test_a_run_with_arms_is_not_overwritten_and_a_subset_of_arms_can_be_trained(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    existing = run.with_name("existing")
    shutil.copytree(run, existing)
    shutil.rmtree(existing / "checkpoints")
    config = str(existing / "config.yaml")
    assert main(["fit", "-c", config, "--run", str(existing)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["fit", "-c", config, "--only", "[solo]", "--run", str(tmp_path / "one")]) == 0
    assert [folder.name for folder in (tmp_path / "one" / "arms").iterdir()] == ["solo"]
    assert main(["fit", "-c", config, "--only", "[sole]", "--run", str(tmp_path / "none")]) == 2
    assert "there is no arm 'sole' among solo, control, weight0.05" in capsys.readouterr().err
    assert main(["fit", "-c", "synthetic", "--run", str(run), "--ckpt_path", "last", *SMALL]) == 2
    assert "the checkpoint holds the arms solo, control, weight0.05" in capsys.readouterr().err


def test_evaluation_reads_arms_from_the_runs_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    fast = ["--critic_seeds", "0", "--tokens", "2048", "--calibration_tokens", "2048", "--resamples", "20"]
    assert main(["test", str(run), *fast]) == 0
    assert "mean |phi|" in capsys.readouterr().out
    record = json.loads((run / "evaluation.json").read_text())["arms"]
    assert [name for name in record if "evaluation" in record[name]] == NAMES
    solo, control, weighted = (run / "arms" / name for name in NAMES)
    assert main(["compare", str(solo), str(control), *fast, "--out", str(tmp_path / "found.json")]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["matching"]["mean_cosine"] == pytest.approx(1, abs=1e-5)  # control equals solo
    assert main(["publish", str(weighted), str(tmp_path / "out")]) == 0
    published = json.loads(next((tmp_path / "out").glob("*/metasae.json")).read_text())
    assert published["recipe"]["model"]["class_path"].endswith("JointSAE")
    assert main(["calibrate", str(run)]) == 2
    assert "holds the arms solo, control, weight0.05: name one" in capsys.readouterr().err
    # The primaries of control and solo are equal, so they share cached results.
    cached_counts = {name: len(list((run / "evaluation").glob(f"{name}-*"))) for name in ("passage", "phi-pairs", "thresholds")}
    assert (
        cached_counts["passage"] % 2 == 0
        and cached_counts["phi-pairs"] == cached_counts["thresholds"] == 2
        and not (solo / "evaluation").exists()
    )
    broken = tmp_path / "broken"
    (broken / "arms").mkdir(parents=True)
    (broken / "config.yaml").write_text("model: {}\n")
    assert main(["test", str(broken)]) == 2
    assert "does not name the arms in" in capsys.readouterr().err
    monkeypatch.chdir(solo)  # the path `.` does not have the arm's name
    assert main(["calibrate", ".", "--calibration_tokens", "2048"]) == 0
    assert "calibration" in json.loads((run / "evaluation.json").read_text())["arms"]["solo"]
    assert not Path("evaluation.json").exists()


def test_the_memory_plan_counts_every_arm_and_one_checkpoint(tmp_path: Path):
    data = SyntheticDataModule(SyntheticModelConfig(num_features=32, hidden_dim=D_IN), tokens=4096, batch_size=64)

    def planned_bytes(module: Any) -> dict[str, int]:
        trainer = Trainer(**QUIET, default_root_dir=tmp_path)
        return {item.name: item.bytes for item in memory_plan(module, data, trainer).items}

    one_arm, three_arms = planned_bytes(joint()), planned_bytes(SideBySide({name: joint() for name in "abc"}))
    for item_name in ("primary SAE", "meta gradients", "optimisers' state", "a checkpoint"):
        assert three_arms[item_name] == pytest.approx(3 * one_arm[item_name], rel=0.01), item_name
    assert three_arms["a primary step"] == pytest.approx(one_arm["a primary step"], rel=0.05)
    assert three_arms["step outputs"] == 2 * 64 * D_IN * 4


def test_a_mistake_in_an_arm_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for change, message in (
        ("{met: null}", r"takes no met \(did you mean meta"),
        ("{primary.init_args.d_in: 32, meta.init_args.d_in: 32}", r"arms.a: .*primary.d_in is 32, but the activations are 64 wide"),
    ):
        (tmp_path / "arms.yaml").write_text(f"arms: {{a: {change}, b: {{}}}}\n")
        assert main(["fit", "-c", "synthetic", "-c", str(tmp_path / "arms.yaml"), "--run", str(tmp_path / "run"), *SMALL]) == 2
        line = capsys.readouterr().err.strip().split("\n")[-1]
        assert re.search(message, line) and line.startswith("metasae: error: "), line
    assert not (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "arms").exists()

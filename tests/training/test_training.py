"""Joint training from the command line on synthetic data: the run's folder, its results, resuming, and errors."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from sae_lens import SAE
from torch.optim import Adam

from metasae_lightning import SyntheticDataModule, functional
from metasae_lightning.callbacks import Export, HeldOut, Summary, TokenProgress
from metasae_lightning.cli import main
from metasae_lightning.compute import SHARED
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability
from metasae_lightning.schedules import WarmupDecay
from metasae_lightning.training import JointSAE
from metasae_lightning.training.argument_checks import check_trainer
from tests.helpers.architectures import activations, config

SMALL = ["--data.init_args.tokens", "30000", "--data.init_args.validation_tokens", "8192", "--data.init_args.test_tokens", "8192"]

QUIET: dict[str, Any] = {
    **{"max_epochs": 1, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0},
    **{"enable_checkpointing": False, "enable_model_summary": False},
}


def fit(run: Path, *more: str) -> int:
    return main(["fit", "-c", "synthetic", "--run", str(run), *SMALL, *more])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    assert fit(folder) == 0
    return folder


def figures(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def test_a_run_has_the_documented_folder(run: Path):
    for name in ("config.yaml", "metrics.csv", "evaluation.json", "checkpoints/last.ckpt", "saes/primary/cfg.json", "saes/meta/cfg.json"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events.*"))
    columns = (run / "metrics.csv").read_text().split("\n")[0].split(",")
    assert {"train/loss", "train/fvu", "train/l0", "train/dead", "train/tokens", "penalty/decomposability", "meta/fvu", "val/fvu"} <= set(
        columns
    )


def test_the_shared_buffers_are_freed_at_the_end_of_a_run(tmp_path: Path):
    assert SHARED.get("rebuilt", (4, 4), torch.zeros(1)) is not None
    assert fit(tmp_path / "run", "--data.init_args.tokens", "2048") == 0
    assert SHARED._buffers == {}


def test_the_saved_config_reproduces_the_run(run: Path, tmp_path: Path):
    assert main(["fit", "-c", str(run / "config.yaml"), "--run", str(tmp_path / "again")]) == 0
    first_config, second_config = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, tmp_path / "again"))
    assert {**first_config, "run": ""} == {**second_config, "run": ""}
    for name in ("primary", "meta"):
        first_sae, second_sae = (SAE.load_from_disk(folder / "saes" / name) for folder in (run, tmp_path / "again"))
        assert all(torch.equal(first_sae.state_dict()[key], value) for key, value in second_sae.state_dict().items())


def test_the_exported_sae_has_the_l0_and_fvu_that_the_run_reports(run: Path):
    exported = figures(run)["validation"]["exported"]["primary"]
    data = SyntheticDataModule(synthetic_model(), tokens=1024, batch_size=1024, shared_subspaces=16, sharing=1.0, test_tokens=32_768)
    x = torch.cat([batch.activations for batch in data.test_dataloader()])
    sae = SAE.load_from_disk(run / "saes" / "primary")
    codes = sae.encode(x)
    assert (codes > 0).sum(-1).float().mean().item() == pytest.approx(8, rel=0.02)
    assert functional.fvu(x, sae.decode(codes)).item() == pytest.approx(exported["fvu"], abs=0.01)


def synthetic_model() -> Any:
    from metasae_lightning.data.synthetic import SyntheticModelConfig

    return SyntheticModelConfig(num_features=256, hidden_dim=64, std_firing_magnitudes=0.3, seed=0)


def test_the_test_command_keeps_the_training_results_and_adds_those_of_test_data(run: Path):
    before = figures(run)["validation"]
    assert main(["test", "-c", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    after = figures(run)
    assert after["validation"] == before
    assert after["test"]["primary"]["fvu"] == pytest.approx(before["primary"]["fvu"], abs=0.05)
    assert after["test"]["primary"]["fvu"] != before["primary"]["fvu"]  # test tokens differ from validation tokens
    assert (run / "metrics.csv").stat().st_size > 0


def test_the_test_command_without_a_checkpoint_is_refused(run: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["test", "-c", str(run / "config.yaml")]) == 2
    assert "--ckpt_path is missing" in last_line(capsys)


def test_an_existing_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]):
    files_before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert fit(run) == 2
    assert "holds a run already" in last_line(capsys)
    assert files_before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().split("\n")
    assert sum(line.startswith("metasae: error: ") for line in lines) == 1 and lines[-1].startswith("metasae: error: ")
    return lines[-1]


def test_resuming_saves_the_config_of_the_longer_run_without_ckpt_path(run: Path, tmp_path: Path):
    folder, overlay = tmp_path / "more", tmp_path / "keep_all.yaml"
    keep_all = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"save_top_k": -1}}
    overlay.write_text(yaml.safe_dump({"trainer": {"val_check_interval": 0.5, "callbacks": [{"class_path": "Summary"}, keep_all]}}))
    assert fit(folder, "-c", str(overlay)) == 0
    middle = min((folder / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert fit(folder, "-c", str(overlay), "--ckpt_path", str(middle), "--data.init_args.tokens", "40000") == 0
    saved_config = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved_config["ckpt_path"] is None and saved_config["data"]["init_args"]["tokens"] == 40000
    assert figures(folder)["validation"]["tokens"] > figures(run)["validation"]["tokens"]


def test_a_directory_without_checkpoints_or_saes_can_be_used(run: Path, tmp_path: Path):
    (tmp_path / "used").mkdir()
    for name in ("config.yaml", "metrics.csv"):
        shutil.copy(run / name, tmp_path / "used")
    assert fit(tmp_path / "used") == 0
    assert (tmp_path / "used" / "metrics.1.csv").read_bytes() == (run / "metrics.csv").read_bytes()


P, M = "--model.init_args.primary.init_args", "--model.init_args.meta.init_args"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.init_args.tokns", "5"], r"SyntheticDataModule takes no tokns \(did you mean tokens"),
        ([f"{P}.kk", "5"], r"BatchTopKTrainingSAEConfig takes no kk \(did you mean k\?"),
        ([f"{P}.k", "500"], r"primary.k must lie between 1 and d_sae=256, got 500"),
        ([f"{P}.d_in", "32", f"{M}.d_in", "32"], r"primary.d_in is 32, but the activations are 64 wide: set d_in: 64"),
        ([f"{M}.d_in", "32"], r"meta.d_in must be the primary's .* set d_in: 64"),
        ([f"{P}.normalize_activations", "layernorm"], r"normalize_activations"),
        (["--model.init_args.meta", "null"], r"penalties.decomposability .* there is none: set model.meta"),
        (["--model.init_args.n_p", "ten"], r"n_p: expected int, got ten"),
        (["--trainer.max_epoch", "3"], r"no option trainer.max_epoch \(did you mean trainer.max_epochs"),
        (["--modle.x", "3"], r"no option modle.x \(did you mean model"),
        (["--model.init_args.primry.init_args.k", "3"], r"no option primry.init_args.k \(did you mean primary\?"),
        (["--data.class_path", "metasae_lightning.SyntheticDataModul"], r"no class .*did you mean metasae_lightning.SyntheticDataModule"),
        (["-c", "no_such_recipe.yaml"], r"no_such_recipe.yaml"),
        (["--data.init_args.batch_size", "0"], r"batch_size"),
        (["--trainer.max_steps", "10"], r"the budget is data.init_args.tokens"),
        (["--trainer.precision", "bf16-true"], r"precision must be 32-true, 64-true or bf16-mixed"),
        (["--trainer.gradient_clip_val", "1.0"], r"trainer.gradient_clip_val: .*: set model.clip_grad_norm"),
        (["--model.init_args.primary_scheduler.class_path", "torch.optim.lr_scheduler.ReduceLROnPlateau"], r"waits for a metric"),
    ],
)
def test_a_mistake_is_a_one_line_error_and_leaves_no_folder(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert fit(tmp_path / "run", *arguments) == 2
    line = last_line(capsys)
    assert re.search(message, line) and len(line) < 400, line
    assert not (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "saes").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_p: 10", "n_pp: 10", r"JointSAE takes no n_pp \(did you mean n_p"),
        ("class_path: Decomposability", "class_path: Decomposbility", r"no class Decomposbility \(did you mean Decomposability"),
        ("accelerator: cpu", "accelerater: cpu", r"no option trainer.accelerater \(did you mean trainer.accelerator"),
        ("trainer:\n", "trainner:\n", r"no option trainner.accelerator \(did you mean trainer"),
        ("sigma_sq: 1.0}", "sigma_sq: 1.0", r"not YAML: line \d+, column \d+"),
    ],
)
def test_a_mistyped_yaml_is_a_one_line_error(old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = Path("configs/synthetic.yaml").read_text()
    assert old in recipe
    (tmp_path / "bad.yaml").write_text(recipe.replace(old, new))
    assert main(["fit", "-c", str(tmp_path / "bad.yaml"), "--run", str(tmp_path / "run")]) == 2
    assert re.search(message, last_line(capsys))


def test_an_unknown_command_is_refused_with_the_closest_one_and_fit_has_a_run_option(capsys: pytest.CaptureFixture[str]):
    assert main(["frit"]) == 2
    assert "there is no command frit (did you mean fit?)" in last_line(capsys)
    assert main(["fit", "--help"]) == 0 and "--run" in capsys.readouterr().out


class RecordOutputs(Callback):
    """Records the outputs and the learning rate of each step."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.outputs.append(outputs["output"])
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


class UnsizedSource:
    """A user's own activations: an iterable without a length."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return (activations(i) for i in range(self.batches))


class SizedSource(UnsizedSource):
    def __len__(self) -> int:
        return self.batches


def train_joint(
    source: Any, tmp_path: Path, *, callbacks: list[Callback] | None = None, datamodule: Any = None, **kw: Any
) -> tuple[JointSAE, RecordOutputs]:
    trainer = {name: kw.pop(name) for name in ("precision",) if name in kw}
    module = JointSAE(
        config("batchtopk"),
        config("topk", d_sae=12),
        {"d": Decomposability(0.3)},
        **{"n_p": 3, "n_m": 2, "primary_optimizer": adam, **kw},
    )
    recorded = RecordOutputs()
    Trainer(
        **QUIET, enable_progress_bar=False, default_root_dir=tmp_path, callbacks=[recorded, *(callbacks or [])], **trainer,
    ).fit(module, source, datamodule=datamodule)  # fmt: skip
    return module, recorded


def adam(params: Any) -> torch.optim.Optimizer:
    return Adam(params, lr=1e-3)


def test_any_iterable_of_tensors_can_be_trained_on(tmp_path: Path):
    module, recorded = train_joint(SizedSource(10), tmp_path)
    assert len(recorded.outputs) == 10
    # 10 steps with n_p = 3: meta phases after 3, 6 and 9, and a shorter one after 10
    assert [i for i, output in enumerate(recorded.outputs, 1) if output.meta is not None] == [3, 6, 9, 10]
    assert int(module.meta.steps) == 8  # type: ignore[union-attr]


def test_training_on_an_iterable_without_length_ends_with_a_meta_phase(tmp_path: Path):
    _, recorded = train_joint(UnsizedSource(4), tmp_path)
    assert [output.meta is not None for output in recorded.outputs] == [False, False, True, True]


def test_schedules_follow_each_optimiser(tmp_path: Path):
    module, recorded = train_joint(
        SizedSource(8), tmp_path, primary_scheduler=lambda o: WarmupDecay(o, warmup=0.5, decay=0.25, shape="linear"),
        meta_scheduler=lambda o: WarmupDecay(o, decay=0.5),
    )  # fmt: skip
    # Rate after each of 8 steps: rises to 1e-3 over 4 steps, is constant for 2, then falls linearly to 0.
    assert recorded.rates == pytest.approx([5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 5e-4, 0.0])
    assert module._schedules["meta"].total_steps == 6  # type: ignore[attr-defined]  # phases after 3, 6 and 8


def test_bf16_mixed_autocasts_over_fp32_parameters(tmp_path: Path):
    batches = SizedSource(12)
    module, recorded = train_joint(batches, tmp_path, precision="bf16-mixed")
    float32_module, float32_recorded = train_joint(batches, tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert all(torch.isfinite(output.loss) for output in recorded.outputs)
    assert not torch.equal(module.primary.W_dec, float32_module.primary.W_dec)  # autocast was active
    assert recorded.outputs[-1].primary.fvu.item() == pytest.approx(float32_recorded.outputs[-1].primary.fvu.item(), abs=0.02)


def test_validation_and_callbacks_do_not_change_training(tmp_path: Path):
    data: dict[str, Any] = {"tokens": 8192, "batch_size": 512, "validation_tokens": 2048}

    def trained_module(callbacks: list[Callback], interval: float) -> JointSAE:
        module = JointSAE(
            config("batchtopk", d_in=64), config("topk", d_in=64, d_sae=12), {"d": Decomposability(0.3)}, primary_optimizer=adam
        )
        Trainer(
            **QUIET, enable_progress_bar=bool(callbacks), default_root_dir=tmp_path, callbacks=callbacks, val_check_interval=interval,
        ).fit(module, datamodule=SyntheticDataModule(synthetic_model(), **data))  # fmt: skip
        return module

    with_callbacks = trained_module([HeldOut(), Export(every_tokens=2048), TokenProgress(), Summary()], 2)
    without_callbacks = trained_module([], 1.0)
    assert all(torch.equal(value, without_callbacks.state_dict()[key]) for key, value in with_callbacks.state_dict().items())
    assert (tmp_path / "saes" / "primary" / "cfg.json").exists()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path):
    class SaveAtStep6(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def train(callbacks: list[Callback], checkpoint: Path | None) -> JointSAE:
        module = JointSAE(
            config("batchtopk", d_in=64), config("topk", d_in=64, d_sae=12), {"d": Decomposability(0.3, warm_up_steps=9)}, n_p=4, n_m=2,
            primary_optimizer=adam, primary_scheduler=lambda o: WarmupDecay(o, warmup=0.2, decay=0.5), dead_after_tokens=1024,
        )  # fmt: skip
        Trainer(
            **QUIET, enable_progress_bar=False, default_root_dir=tmp_path, callbacks=callbacks, limit_val_batches=0,
        ).fit(module, datamodule=SyntheticDataModule(synthetic_model(), tokens=8192, batch_size=512), ckpt_path=checkpoint)  # fmt: skip
        return module

    uninterrupted, resumed = train([SaveAtStep6()], None), train([], tmp_path / "middle.ckpt")
    assert int(resumed.primary.steps) == 16
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in uninterrupted.state_dict().items())


def test_several_ranks_with_an_unsupported_strategy_are_refused():
    trainer = SimpleNamespace(world_size=2, strategy=SingleDeviceStrategy(), precision="32-true", max_steps=-1)
    with pytest.raises(InputError, match="strategy must be ddp, sharded, or one made from them, on 2 ranks, got SingleDeviceStrategy"):
        check_trainer(trainer)


@pytest.mark.slow
def test_joint_training_lowers_the_penalty_against_the_control_on_synthetic_data(tmp_path: Path):
    """Prints the recovery of the true features in both runs, which is not asserted."""
    assert main(["fit", "-c", "synthetic", "--run", str(tmp_path / "joint")]) == 0
    assert main(["fit", "-c", "synthetic", "-c", "control", "--run", str(tmp_path / "control")]) == 0
    joint, control = (figures(tmp_path / name)["validation"] for name in ("joint", "control"))
    print({name: (run["penalties"], run["primary"]) for name, run in (("joint", joint), ("control", control))})
    assert joint["penalties"]["decomposability"] < 0.98 * control["penalties"]["decomposability"]
    assert 0 < joint["primary"]["mcc"] < 1 and 0 < control["primary"]["mcc"] < 1


def test_a_run_on_synthetic_data_is_evaluated_on_its_true_features(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    copied = shutil.copytree(run, tmp_path / "measured")
    assert main(["test", str(copied), "--critic_seeds=0", "--resamples=20"]) == 0
    evaluation = figures(copied)["evaluation"]
    validation = figures(run)["validation"]["primary"]
    assert evaluation["figures"]["recovery"]["mcc"] == pytest.approx(validation["mcc"], abs=1e-4)
    assert evaluation["figures"]["recovery"]["f1"] == pytest.approx(validation["f1"], abs=0.05)
    assert evaluation["figures"]["reconstruction"]["fvu"] == pytest.approx(validation["fvu"], rel=0.1)
    assert "splice" not in evaluation["figures"] and "features recovered (MCC)" in capsys.readouterr().out

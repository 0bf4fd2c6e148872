"""A run goes on from a checkpoint with the checkpoint's settings; those that may differ take effect and are said in one line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from metasae_lightning.cli import main, parser_errors, resume
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO

ROOT = Path(__file__).parents[2]
QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def words(run: Path, *more: str) -> list[str]:
    sizes = ["--data.init_args.tokens=4096", "--data.init_args.validation_tokens=512", "--data.init_args.batch_size=512"]
    return ["fit", "-c", "synthetic", "--run", str(run), *sizes, *more]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("resume") / "run"
    assert main(words(run)) == 0
    return run


def changed(config: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy of a config with another value, or without the key where the value is `gone`."""
    config = yaml.safe_load(yaml.safe_dump(config))
    *parents, key = name.split(".")
    tree = config
    for parent in parents:
        tree = tree[parent]
    tree[key] = value
    if value == "gone":
        del tree[key]
    return config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.init_args.primary.init_args.d_sae", 512),
        ("model.init_args.primary.init_args.k", 4),
        ("model.init_args.n_m", 3),
        ("model.init_args.primary_scheduler.init_args.warmup", 0.5),
        ("model.init_args.primary_scheduler", None),
        ("model.init_args.primary_optimizer.init_args.betas", [0.9, 0.999]),
        ("model.init_args.meta", None),
        ("model.init_args.penalties", {}),
        ("model.init_args.penalties.decomposability.init_args.sigma_sq", 2.0),
        ("model.init_args.penalties.more", {"class_path": "metasae_lightning.penalties.Orthogonality", "init_args": {"weight": 0.1}}),
        ("model.init_args.dead_after_tokens", 1),
        ("model.init_args.seed", 1),
        ("data.init_args.model.num_features", 128),
        ("data.init_args.batch_size", 256),
        ("data.init_args.seed", 1),
    ],
)
def test_a_setting_that_shapes_weights_stream_or_schedule_is_refused_by_name(run: Path, name: str, value: Any):
    checkpoint = run / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["config"]
    resume.check_settings(checkpoint, saved)  # the control
    with pytest.raises(ValueError, match=rf"last\.ckpt goes on with its own settings alone \({name}[.:].* may change"):
        resume.check_settings(checkpoint, changed(saved, name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.init_args.penalties.decomposability.init_args.weight", 0.1),
        ("model.init_args.primary_optimizer.init_args.lr", 2e-3),
        ("model.init_args.clip_grad_norm", 1.0),
        ("data.init_args.tokens", 8192),
        ("trainer.callbacks", []),
        ("trainer.devices", 2),
    ],
)
def test_a_setting_that_may_change_is_said_in_one_line(run: Path, capsys: pytest.CaptureFixture[str], name: str, value: Any):
    checkpoint = run / "checkpoints" / "last.ckpt"
    resume.check_settings(checkpoint, changed(torch.load(checkpoint, weights_only=True)["config"], name, value))
    (line,) = capsys.readouterr().err.strip().split("\n")
    assert line.startswith(f"metasae: goes on with other settings than the checkpoint's: {name}: ") and line.endswith(" now")


def test_an_argument_that_is_new_in_this_version_is_no_difference(run: Path, capsys: pytest.CaptureFixture[str]):
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["config"]
    then = changed(saved, "model.init_args.n_m", "gone")
    assert resume.differences(resume.settings(then), resume.settings(saved)) == {}


def test_the_config_of_the_run_stands_in_for_a_checkpoint_without_settings(run: Path, tmp_path: Path):
    checkpoint = tmp_path / "run" / "checkpoints" / "tokens=1.ckpt"
    AtomicCheckpointIO().save_checkpoint({"epoch": 0}, checkpoint)
    config = yaml.safe_load((run / "config.yaml").read_text())
    resume.check_settings(checkpoint, changed(config, "model.init_args.n_m", 3))
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"n_m: 5 then, 3 now"):
        resume.check_settings(checkpoint, changed(config, "model.init_args.n_m", 3))


def test_a_run_on_a_checkpoint_of_another_size_is_one_line(run: Path, capsys: pytest.CaptureFixture[str]):
    size = "--model.init_args.primary.init_args.d_sae=128"
    assert main(words(run, "--ckpt_path", "last", size)) == 2
    assert "d_sae: 256 then, 128 now)" in capsys.readouterr().err.strip().split("\n")[-1]
    validation = words(run, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), size)
    assert main(["validate", *validation[1:]]) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("metasae: error: the checkpoint is of another run (size mismatch for primary") and len(line) < 300
    assert parser_errors.machine_error_line(RuntimeError("size mismatch: a bug")) == ""


class Line(LightningModule):
    """One weight, trained by SGD under a schedule that halves the learning rate at every second step."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.rate, self.rates = rate, list[float]()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 ** (step // 2))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return self.weight * batch.mean()


class FourBatches(torch.utils.data.IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.ones(4, 1))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_new_learning_rate_takes_effect_and_its_schedule_goes_on(tmp_path: Path):
    def rates(rate: float, epochs: int, *callbacks: Callback) -> list[float]:
        module = Line(rate)
        trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", max_epochs=epochs, callbacks=list(callbacks), **QUIET)
        checkpoint = tmp_path / "first.ckpt" if epochs == 2 else None
        trainer.fit(module, torch.utils.data.DataLoader(FourBatches(), batch_size=None), ckpt_path=checkpoint)
        if epochs == 1:
            trainer.save_checkpoint(tmp_path / "first.ckpt")
        return module.rates

    assert rates(1.0, 1) == [1.0, 1.0, 0.5, 0.5]
    assert rates(1.0, 2, resume.RunSettings({})) == [0.25, 0.25, 0.125, 0.125]
    assert rates(4.0, 2) == [0.25, 0.25, 0.125, 0.125]  # the control: the checkpoint's rate wins
    assert rates(4.0, 2, resume.RunSettings({})) == [1.0, 1.0, 0.5, 0.5]

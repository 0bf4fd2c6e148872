"""A run that cannot begin: one line, before anything is loaded, and nothing left behind."""

import logging
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from metasae_lightning.cli import main
from metasae_lightning.cli.start import HeldLines, check_intervals, clean_failed_start
from metasae_lightning.errors import InputError
from metasae_lightning.lm.backends import HuggingFaceLM
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.training import JointSAE
from tests.helpers.models import save_model

SCHEDULE = "{class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {max_lr: 1, total_steps: 0}}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["synthetic", "--model.init_args.primary_optimizer.init_args.lr", "-1"], "primary_optimizer: Invalid learning rate: -1.0"),
        (["synthetic", "--model.init_args.primary_scheduler", SCHEDULE], "primary_scheduler: Expected positive integer total_steps"),
        (["synthetic", "--model.meta_dead_after_steps", "-1"], "meta_dead_after_steps must be at least 1"),
        (["synthetic", "--model.hook", "blocks.0"], "hook: the data give synthetic: name one of them, got blocks.0"),
        (["synthetic", "--data.validation_tokens", "-1"], "validation_tokens must fill a batch of 1024, got -1"),
        (["synthetic", "--model.clip_grad_norm", "nan"], "clip_grad_norm: expected float, got nan"),
        (["synthetic", "--model.micro_batches", "1025"], "micro_batches must be at most the 1,024 rows of a batch, got 1,025"),
        (["synthetic", "--data.sharing", "-1"], "sharing must be 0 or more, got -1.0"),
        (["synthetic", "--data.model.std_firing_magnitudes", "-0.3"], "model.std_firing_magnitudes must be 0 or more, got -0.3"),
        (["synthetic", "--trainer.accelerator", "gpu"], "trainer.accelerator: gpu is not there: there is cpu alone"),
        (["synthetic", "--model.primary.device", "cuda:9"], "primary.device: 'cuda:9' is not there: there is cpu alone"),
        (["synthetic", "--grid", "a: &a [*a]"], "a value contains itself: a YAML alias is inside of its own anchor"),
        (["synthetic", "--ckpt_path", "best"], "--ckpt_path best: a run keeps its newest checkpoints, and none as the best"),
        (["quickstart", "--init_from", "runs/a"], "there is no option init_from: write --model.init_from"),
        (["quickstart", "--tokens=2048"], "there is no option tokens: write --data.tokens"),
        (["quickstart", "--model.init_args.init_from", "missing"], "arms.solo: init_from: 'missing' is neither a folder nor"),
        (["quickstart", "-c", "solo", "--data.init_args.validation_tokens", "1"], "validation_tokens must fill a batch of 1024, got 1"),
        (
            ["quickstart", "-c", "solo", "--data.init_args.tokens", "2048", "--model.init_args.primary_scheduler.init_args.warmup", "50"],
            "the run has 2",
        ),
        (
            ["quickstart", "-c", "solo", "--data.init_args.corpus", "TextFiles", "--data.init_args.corpus.init_args.paths", "missing.txt"],
            "paths: 'missing.txt' does not exist",
        ),
    ],
)
def test_a_run_that_cannot_begin_is_one_line_and_leaves_nothing(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for module in ("cli.start", "lm.device"):
        monkeypatch.setattr(f"metasae_lightning.{module}.count_gpus", lambda: 0)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    monkeypatch.setattr(LanguageModel, "load", lambda self: pytest.fail("loaded"))
    assert main(["fit", "-c", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metasae: error: ") and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_epochs": 0}, "trainer.max_epochs must be at least 1, got 0"),
        ({"log_every_n_steps": -1}, "trainer.log_every_n_steps must be at least 0, got -1"),
        ({"val_check_interval": 0}, "trainer.val_check_interval must be more than 0 and at most the run's 9 steps, got 0"),
        ({"val_check_interval": 10}, "trainer.val_check_interval must be more than 0 and at most the run's 9 steps, got 10"),
        (
            {"accumulate_grad_batches": 2},
            "trainer.accumulate_grad_batches: the model takes its own optimiser steps: set model.micro_batches",
        ),
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val: the model takes its own optimiser steps: set model.clip_grad_norm"),
    ],
)
def test_options_of_the_trainer_that_no_run_can_have_are_refused(change: dict[str, float], says: str):
    given = {"max_epochs": 1, "log_every_n_steps": 10, "val_check_interval": 9, "accumulate_grad_batches": 1, "gradient_clip_val": None}
    check_intervals(SimpleNamespace(**given, check_val_every_n_epoch=1), 9)
    with pytest.raises(InputError, match=f"^{re.escape(says)}"):
        check_intervals(SimpleNamespace(**{**given, **change}, check_val_every_n_epoch=1), 9)


# Loggers have begun their files by then.
@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt(), ZeroDivisionError()])
def test_an_error_before_the_first_step_leaves_no_folder(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: JointSAE) -> None:
        assert list(tmp_path.rglob("events.out.tfevents.*"))
        raise error

    monkeypatch.setattr(JointSAE, "on_train_start", fail)
    words = ["fit", "-c", "synthetic", "--data.init_args.tokens", "1024", "--run", str(tmp_path / "a" / "b")]
    if isinstance(error, ZeroDivisionError):
        with pytest.raises(ZeroDivisionError):
            main(words)
    else:
        assert main(words) == (2 if isinstance(error, InputError) else 130)
    assert not list(tmp_path.iterdir())


def test_weights_of_a_language_model_that_cannot_be_read_are_one_line(tmp_path: Path):
    folder = save_model(tmp_path, "llama")
    (Path(folder) / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"^name: the weights of '.*' cannot be read: .*header"):
        HuggingFaceLM(str(folder), "blocks.0.hook_resid_post").load()


def write_files_and_fail(run: Path) -> None:
    for name in ("empty", "full"):
        logger = TensorBoardLogger(str(run), name=name, version="")
        logger.log_metrics({"x": 1.0} if name == "full" else {})
        assert logger.experiment
        logger.finalize("failed")
    (run / "new" / "folder").mkdir(parents=True)
    raise ZeroDivisionError


def test_only_files_without_content_are_removed(tmp_path: Path):
    run = tmp_path / "runs" / "a"
    (run / "empty").mkdir(parents=True)
    with pytest.raises(ZeroDivisionError), clean_failed_start(run):
        write_files_and_fail(run)
    assert sorted(path.name.split(".")[0] for path in run.rglob("*")) == ["empty", "events", "full"]


def write_lines(logger: logging.Logger, error: Exception, held: HeldLines, released: bool) -> None:
    if released:
        held.release()
    logger.info("a line")
    warnings.warn("a warning", stacklevel=1)
    raise error


@pytest.mark.parametrize("error", [InputError("no"), ZeroDivisionError()])
@pytest.mark.parametrize("released", [True, False])
def test_lines_are_held_back_until_they_are_released(released: bool, error: Exception, monkeypatch: pytest.MonkeyPatch):
    printed: list[str] = []
    logger, target = logging.getLogger("lightning.pytorch"), logging.StreamHandler()
    monkeypatch.setattr(logger, "handlers", [target])
    monkeypatch.setattr(target, "emit", lambda record: printed.append(record.getMessage()))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *_: printed.append(str(message))
        with pytest.raises(type(error)), HeldLines() as held:
            write_lines(logger, error, held, released)
    assert printed == (["a line", "a warning"] if released or isinstance(error, ZeroDivisionError) else [])
    assert logger.handlers == [target]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["synthetic"], "data: only ActivationsDataModule has activations to cache, got SyntheticDataModule"),
        (["quickstart", "--data.cache", "out", "--shard_gib", "0"], "shard_gib must be more than 0, got 0.0"),
        # Not even root can make a folder there.
        (["quickstart", "--data.cache", "/proc/out"], "cache: /proc/out: /proc is not a directory that can be written to"),
        (["quickstart", "--data.cache", "run"], "cache: run holds a run: name another folder"),
        (["quickstart", "--data.cache", "out", "--data.context_size", "9000"], "context_size must be at most 8192"),
    ],
)
def test_a_cache_that_cannot_be_written_is_one_line_and_leaves_nothing(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LanguageModel, "load", lambda self: pytest.fail("loaded"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert main(["cache", "-c", *words, "--model.meta=null", "--model.penalties={}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("metasae: error: ") and error.count("\n") == 1 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_cache_prints_its_memory_plan_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def load(self: LanguageModel) -> None:
        raise InputError(capsys.readouterr().err)

    monkeypatch.setattr(LanguageModel, "load", load)
    assert main(["cache", "-c", "quickstart", "--data.cache", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "language model" in error and "its forward pass" in error and "cpu, peak" in error and "SAE" not in error

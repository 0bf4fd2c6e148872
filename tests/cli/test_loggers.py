"""Loggers that a recipe names: a logged run for each arm in one group, with the config, figures and the closing table."""

import csv
import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure

from metasae_lightning.callbacks.logger_media import kind_of, log_figure, log_histogram, log_row
from metasae_lightning.cli import main
from metasae_lightning.cli.loggers import LoggerByArm, announce_wandb_server, log_recipe, logger_arguments, loggers_of_run

RECIPE = """
trainer:
  logger:
    class_path: lightning.pytorch.loggers.WandbLogger
    init_args: {project: metasae, offline: true}
  callbacks+:
    - class_path: Figures
arms:
  solo: {penalties: {}, meta: null}
  joint: {}
"""
SMALL = ["--data.init_args.tokens", "10240", "--data.init_args.validation_tokens", "2048"]


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of an offline run's file: LevelDB's log format behind a header of seven bytes, each record a protobuf message."""
    from wandb.proto import wandb_internal_pb2

    data, at, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        _, length, part = struct.unpack("<IHB", data[at : at + 7])
        if (left := 32768 - at % 32768) < 7 or part == 0:
            at += left
            continue
        message, at = message + data[at + 7 : at + 7 + length], at + 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


@pytest.fixture(scope="module")
def wandb_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A run of two arms logged by the real client of W&B, offline; the records of each logged run by its name."""
    wandb, folder = pytest.importorskip("wandb"), tmp_path_factory.mktemp("wandb")
    (folder / "wandb.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        # Lightning sets the mode in the environment; the console would be captured twice.
        for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
            patch.setenv(name, value)
        assert main(["fit", "-c", "synthetic", "-c", str(folder / "wandb.yaml"), "--run", str(folder / "study"), *SMALL]) == 0
        wandb.teardown()
    runs: dict[str, Any] = {"folder": folder / "study"}
    for path in (folder / "study" / "wandb").glob("offline-run-*/run-*.wandb"):
        records = list(wandb_records(path))
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        runs[run.display_name] = SimpleNamespace(run=run, records=records, files=path.parent / "files")
    return runs


def test_the_arms_are_runs_of_one_group_in_the_runs_folder(wandb_runs: dict[str, Any]):
    assert set(wandb_runs) == {"folder", "study-solo", "study-joint"}
    for name in ("study-solo", "study-joint"):
        assert (wandb_runs[name].run.project, wandb_runs[name].run.run_group) == ("metasae", "study")
        assert [record.exit.exit_code for record in wandb_runs[name].records if record.HasField("exit")] == [0]
    assert (wandb_runs["folder"] / "config.yaml").exists() and (wandb_runs["folder"] / "metrics.csv").exists()


def test_the_logged_values_are_those_of_the_arm(wandb_runs: dict[str, Any]):
    with (wandb_runs["folder"] / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for arm in ("solo", "joint"):
        expected = [float(row[f"{arm}/train/loss"]) for row in rows if row[f"{arm}/train/loss"]]
        items = [item for record in wandb_runs[f"study-{arm}"].records for item in record.history.item]
        logged = [float(item.value_json) for item in items if (item.key or "/".join(item.nested_key)) == "train/loss"]
        assert expected and logged == pytest.approx(expected)
        assert not any("joint/" in item.key or "solo/" in item.key for item in items)


def test_figures_the_closing_table_and_the_arms_own_config_are_logged(wandb_runs: dict[str, Any]):
    evaluation = json.loads((wandb_runs["folder"] / "evaluation.json").read_text())
    for arm in ("solo", "joint"):
        logged = wandb_runs[f"study-{arm}"]
        assert {path.parent.name for path in logged.files.glob("media/images/**/*.png")} == {"decoder", "val"}
        (table_file,) = logged.files.glob("media/table/**/*.json")
        table = json.loads(table_file.read_text())
        row = dict(zip(table["columns"], table["data"][0], strict=True))
        assert row["arm"] == arm and row["primary/fvu"] == evaluation["arms"][arm]["validation"]["primary"]["fvu"]
        assert any(record.artifact.type == "run_table" for record in logged.records)
        config = {update.key: update.value_json for record in logged.records for update in record.config.update}
        assert (json.loads(config["model"])["init_args"]["meta"] is None) == (arm == "solo")


class Recorder(CSVLogger):
    """A logger of another class whose calls are stored."""

    def __init__(self) -> None:
        self.values: list[tuple[dict[str, float], int | None]] = []
        self.params: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.values.append((dict(metrics), step))

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        self.params.append(params)


# With a logger of the whole run the values of no arm go there; without one, to every arm's.
@pytest.mark.parametrize("with_whole", [True, False])
def test_values_go_to_their_arms_and_the_others_to_the_whole_run_or_to_every_arm(with_whole: bool):
    a, b, whole = Recorder(), Recorder(), Recorder()
    LoggerByArm({"a": a, "b": b}, whole if with_whole else None).log_metrics({"a/fvu": 1.0, "b/fvu": 2.0, "rate": 3.0}, 7)
    shared = {} if with_whole else {"rate": 3.0}
    assert a.values == [({"fvu": 1.0, **shared}, 7)] and b.values == [({"fvu": 2.0, **shared}, 7)]
    assert whole.values == ([({"rate": 3.0}, 7)] if with_whole else [])


def test_the_config_is_logged_without_secrets_to_named_loggers_and_each_arm_gets_its_own(tmp_path: Path):
    arms = {"a": {"class_path": "A"}, "b": {"class_path": "B"}}
    recipe = {"model": {"init_args": {"arms": arms}}, "data": {"hub_token": "mine", "tokens": 5}}

    class Named(WandbLogger):
        params: Any = None

        def log_hyperparams(self, params: Any) -> None:
            self.params = params

    a, b, default = Named(), Named(), Recorder()
    log_recipe([default, LoggerByArm({"a": a, "b": b})], recipe)
    assert default.params == []
    assert a.params == {"model": arms["a"], "data": {"tokens": 5}} and b.params["model"] == arms["b"]


def test_a_logger_of_an_unknown_class_stays_and_metrics_csv_is_always_written(tmp_path: Path):
    other, tensorboard = Recorder(), TensorBoardLogger(str(tmp_path), name="tb", version="v")
    entry = {"init_args": {"save_dir": str(tmp_path), "name": "tb", "version": "v"}}
    first, kept, by_arm = loggers_of_run(str(tmp_path / "run"), ["solo"], [(other, {}), (tensorboard, entry)])
    assert isinstance(first, CSVLogger) and Path(first.log_dir) == tmp_path / "run" and kept is other
    assert Path(by_arm.of("solo").log_dir) == (tmp_path / "tb" / "v" / "solo")


def test_the_arms_of_mlflow_share_a_tag_and_users_own_names_come_first():
    mlflow: Any = object.__new__(MLFlowLogger)
    assert logger_arguments(mlflow, {"tags": {"who": "me"}}, "runs/one", "joint") == {
        "run_name": "one-joint",
        "tags": {"group": "one", "who": "me"},
    }
    assert logger_arguments(mlflow, {"run_name": "mine"}, "runs/one", "") == {"run_name": "mine"}
    named = logger_arguments(WandbLogger(), {"name": "mine", "group": "ours", "save_dir": "elsewhere"}, "runs/one", "solo")
    assert named == {"name": "mine-solo", "group": "ours", "reinit": "create_new"}


# A stand-in of MLflow's client: the calls and the order of their arguments are those of `mlflow.MlflowClient`.
class Client:
    def __init__(self) -> None:
        self.artefacts: dict[str, Any] = {}

    def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        assert run_id == "id" and isinstance(figure, Figure)
        self.artefacts[artifact_file] = figure

    def log_table(self, run_id: str, data: dict[str, Any], artifact_file: str) -> None:
        self.artefacts[artifact_file] = data


def test_figures_histograms_and_the_table_are_artefacts_of_mlflow():
    logger: Any = SimpleNamespace(experiment=Client(), run_id="id")
    figure = Figure()
    log_figure(logger, "decoder/spectrum", figure, 5)
    log_histogram(logger, "val/log10_density", torch.arange(8.0), 5)
    log_row(logger, "summary/validation", {"arm": "solo", "primary/fvu": 0.5})
    artefacts = logger.experiment.artefacts
    assert artefacts["decoder/spectrum/5.png"] is figure and "val/log10_density/5.png" in artefacts
    assert artefacts["summary/validation.json"] == {"arm": ["solo"], "primary/fvu": [0.5]}


def test_a_logger_that_takes_no_figures_is_left_alone(tmp_path: Path):
    logger = CSVLogger(str(tmp_path))
    assert kind_of(logger) is None
    log_figure(logger, "name", Figure(), 1)
    log_histogram(logger, "name", torch.zeros(2), 1)
    log_row(logger, "name", {})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_logger_whose_client_is_missing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    if importlib.util.find_spec("mlflow") is not None:
        pytest.skip("mlflow is installed")
    words = ["fit", "-c", "synthetic", "--run", str(tmp_path / "run"), "--trainer.logger", "MLFlowLogger"]
    assert main(words) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("metasae: error: lightning.pytorch.loggers.MLFlowLogger: Requirement 'mlflow>=1.0.0' not met")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("mode", "is_announced"), [("online", True), ("offline", False), ("disabled", False)])
def test_the_wait_for_the_server_of_wandb_is_announced_unless_it_logs_offline(
    mode: str, is_announced: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    pytest.importorskip("wandb")
    lines: list[str] = []
    monkeypatch.setattr("metasae_lightning.cli.loggers.rank_zero_info", lines.append)
    monkeypatch.setenv("WANDB_MODE", mode)
    logger = WandbLogger(save_dir=str(tmp_path))
    announce_wandb_server([CSVLogger(str(tmp_path)), WandbLogger(save_dir=str(tmp_path), offline=True)])
    assert not lines
    for loggers in ([logger], [LoggerByArm({"solo": logger})]):
        announce_wandb_server(loggers)
    assert len(lines) == 2 * is_announced


def test_a_server_that_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    wandb_errors = pytest.importorskip("wandb.errors")

    def refuse(*_: Any, **__: Any) -> int:
        raise wandb_errors.CommError("no answer\nfrom the server")

    monkeypatch.setattr("metasae_lightning.cli.entry.run", refuse)
    assert main(["fit"]) == 2
    assert capsys.readouterr().err == "metasae: error: no answer from the server\n"

"""Histograms, figures and tables in the form of each logger: TensorBoard's writer, Weights & Biases, and MLflow."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from torch import Tensor

HISTOGRAM_BINS = 64


def media_loggers(trainer: Trainer) -> list[Any]:
    """The trainer's loggers that accept figures, histograms and tables."""
    return [logger for logger in trainer.loggers if kind_of(logger)]


def kind_of(logger: Any) -> str | None:
    """The form in which a logger accepts figures: `wandb`, `tensorboard`, `mlflow`, or None where it accepts none."""
    if hasattr(logger, "log_image") and hasattr(logger, "log_table"):
        return "wandb"
    experiment = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure") and hasattr(experiment, "add_histogram"):
        return "tensorboard"
    return "mlflow" if hasattr(experiment, "log_figure") and hasattr(logger, "run_id") else None


def log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    """Log a figure. In MLflow it is the artefact `NAME/STEP.png`."""
    if (kind := kind_of(logger)) == "tensorboard":
        logger.experiment.add_figure(name, figure, step, close=False)
    elif kind == "wandb":
        logger.log_image(tagged(logger, name), [figure], step)
    elif kind == "mlflow":
        logger.experiment.log_figure(logger.run_id, figure, f"{tagged(logger, name)}/{step}.png")


def log_histogram(logger: Any, name: str, values: Tensor, step: int) -> None:
    """Log a histogram. MLflow has none: it gets a figure."""
    if (kind := kind_of(logger)) == "tensorboard":
        logger.experiment.add_histogram(name, values, step)
        return
    counts, edges = np.histogram(values.float().numpy(), HISTOGRAM_BINS)
    if kind == "wandb":
        import wandb

        logger.log_metrics({tagged(logger, name): wandb.Histogram(np_histogram=(counts, edges))}, step)  # pyright: ignore[reportArgumentType]
    elif kind == "mlflow":
        figure = Figure(layout="constrained")
        figure.subplots().stairs(counts, edges, fill=True)
        log_figure(logger, name, figure, step)


def log_row(logger: Any, name: str, row: Mapping[str, Any]) -> None:
    """Log a table of one row. W&B joins the tables that the runs of a group have under one name."""
    if (kind := kind_of(logger)) == "wandb":
        logger.log_table(tagged(logger, name), columns=list(row), data=[list(row.values())])
    elif kind == "tensorboard" and hasattr(logger.experiment, "add_text"):
        lines = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in row.items())]
        logger.experiment.add_text(name, "\n".join(lines))
    elif kind == "mlflow":
        logger.experiment.log_table(logger.run_id, {key: [value] for key, value in row.items()}, f"{tagged(logger, name)}.json")


def tagged(logger: Any, name: str) -> str:
    """The name with the arm's name before it, where all arms share the logger."""
    return f"{getattr(logger, 'tag_prefix', '')}{name}"

"""The loggers of a run: `metrics.csv`, and TensorBoard or the loggers that the recipe names, with a logged run for each arm."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from metasae_lightning.redaction import redact


class LoggerByArm(Logger):
    """Metrics named `ARM/NAME` go to the logger of that arm as `NAME`; all others to the logger of the whole run, or to every arm's.

    Args:
        by_arm: The logger of each arm.
        whole: The logger of the whole run, if there is one.
    """

    def __init__(self, by_arm: Mapping[str, Logger], whole: Logger | None = None) -> None:
        super().__init__()
        self._by_arm, self._whole = dict(by_arm), whole
        self.first = whole or next(iter(self._by_arm.values()))
        """The logger that stands for all: their class is the same."""

    @property
    def name(self) -> str | None:
        """Name of the first logger."""
        return self.first.name

    @property
    def version(self) -> int | str | None:
        """Version of the first logger."""
        return self.first.version

    @property
    def save_dir(self) -> str | None:
        """Folder of the first logger."""
        return self.first.save_dir

    @property
    def experiment(self) -> Any:
        """The first logger's own object, such as TensorBoard's writer."""
        return getattr(self.first, "experiment", None)

    def of(self, arm: str) -> Logger:
        """The logger of an arm."""
        return self._by_arm[arm]

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log each metric to the logger of its arm."""
        rest = dict(metrics)
        values = {
            arm: {key.removeprefix(f"{arm}/"): rest.pop(key) for key in list(rest) if key.startswith(f"{arm}/")} for arm in self._by_arm
        }
        for arm, logger in self._by_arm.items():
            if of_arm := {**values[arm], **({} if self._whole else rest)}:
                logger.log_metrics(of_arm, step)
        if rest and self._whole:
            self._whole.log_metrics(rest, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log a run's config: each arm's logger gets the config that trains this arm alone."""
        for arm, logger in self._by_arm.items():
            logger.log_hyperparams(arm_recipe(params, arm))

    def save(self) -> None:
        """Write what the loggers hold back."""
        for logger in self._loggers:
            logger.save()

    def finalize(self, status: str) -> None:
        """Close all loggers. Runs of W&B are finished, since several are open in one process."""
        for logger in self._loggers:
            logger.finalize(status)
            if isinstance(logger, WandbLogger) and logger.version and not rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
                logger.experiment.finish(exit_code=int(status != "success"))

    @property
    def _loggers(self) -> list[Logger]:
        """The arms' loggers and that of the whole run."""
        return [*self._by_arm.values(), *([self._whole] if self._whole else [])]


def arm_recipe(recipe: Any, arm: str) -> Any:
    """The config that trains one arm of a recipe alone; anything that is no recipe with arms is returned unchanged."""
    arms = ((recipe.get("model") or {}).get("init_args") or {}).get("arms") if isinstance(recipe, dict) else None
    return {**recipe, "model": arms[arm]} if arms else recipe


def loggers_of_run(run: str, arms: Sequence[str], named: Sequence[tuple[Any, Any]] = ()) -> list[Any]:
    """The CSV logger of the run's folder, and the recipe's loggers, by default TensorBoard, with a logged run for each arm.

    Args:
        run: The run's folder.
        arms: The arms' names; none for a run of one SAE.
        named: The loggers that the recipe names, each with its entry in the config.
    """
    return [csv_logger(run), *([named_logger(logger, entry, run, arms) for logger, entry in named] or [tensorboard_logger(run, arms)])]


def csv_logger(run: str) -> CSVLogger:
    """The CSV logger of a run. An existing `metrics.csv` is renamed to `metrics.1.csv`, or the next free number."""
    # Lightning's CSV logger deletes an existing file: a resumed run keeps the earlier part under another name.
    earlier = Path(run) / "metrics.csv"
    if earlier.exists() and not rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
        part = next(i for i in range(1, 10_000) if not earlier.with_name(f"metrics.{i}.csv").exists())
        earlier.rename(earlier.with_name(f"metrics.{part}.csv"))
    return CSVLogger(run, name="", version="")


def tensorboard_logger(run: str, arms: Sequence[str]) -> Logger:
    """The TensorBoard logger of a run. Each arm is a TensorBoard run of its own, so that one plot shows all arms."""
    whole = TensorBoardLogger(run, name="tensorboard", version="")
    return LoggerByArm({arm: TensorBoardLogger(run, name="tensorboard", version=arm) for arm in arms}, whole) if arms else whole


def named_logger(logger: Any, entry: Any, run: str, arms: Sequence[str]) -> Any:
    """A logger that the recipe names, with a logged run for each arm where its class is known; `entry` is its place in the config.

    A logger of another class is returned unchanged: it logs metrics as `ARM/NAME`.
    """
    args = {**(entry.get("init_args") or {}), **(entry.get("dict_kwargs") or {})}
    if not isinstance(logger, WandbLogger | MLFlowLogger | TensorBoardLogger):
        return logger
    by_arm = {arm: type(logger)(**{**args, **logger_arguments(logger, args, run, arm)}) for arm in arms or ("",)}
    return LoggerByArm(by_arm) if arms else by_arm[""]


def logger_arguments(logger: Any, args: Mapping[str, Any], run: str, arm: str) -> dict[str, Any]:
    """The arguments that change in a logger of a run: its name, the group that all arms share, and the folder. `arm` is empty without arms.

    >>> logger_arguments(WandbLogger(), {}, "runs/one", "joint")
    {'save_dir': 'runs/one', 'name': 'one-joint', 'group': 'one', 'reinit': 'create_new'}
    """
    name = Path(run).resolve().name
    if isinstance(logger, TensorBoardLogger):
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return {"version": f"{version}/{arm}"} if arm else {}
    if isinstance(logger, MLFlowLogger):
        run_name = args.get("run_name") or name
        tags = {"group": run_name, **(args.get("tags") or {})}
        return {"run_name": f"{run_name}-{arm}", "tags": tags} if arm else {"run_name": run_name}
    own_name = args.get("name") or name
    # W&B's runs of all arms are open at once; by default it has one run in a process.
    of_arm = {"name": f"{own_name}-{arm}", "group": args.get("group") or own_name, "reinit": "create_new"} if arm else {"name": own_name}
    return {**({} if args.get("save_dir", ".") != "." else {"save_dir": run}), **of_arm}


def announce_wandb_server(loggers: Sequence[Any]) -> None:
    """Say that W&B's client connects to its server, which may take minutes where none answers; nothing of a logger that is offline."""
    firsts = [logger.first if isinstance(logger, LoggerByArm) else logger for logger in loggers]
    # Lightning tells the client of `offline: true` only when the client is first used.
    connects = any(isinstance(logger, WandbLogger) and not getattr(logger, "_offline", False) for logger in firsts)
    if connects and os.environ.get("WANDB_MODE", "online") in ("online", "shared"):
        rank_zero_info("W&B: waiting for its server; WANDB_MODE=offline logs to files instead")


def log_recipe(loggers: Sequence[Any], recipe: Mapping[str, Any]) -> None:
    """Log a run's config, without tokens and passwords, as the hyperparameters of all loggers but CSV and TensorBoard."""
    for logger in loggers:
        if not isinstance(logger.first if isinstance(logger, LoggerByArm) else logger, CSVLogger | TensorBoardLogger):
            logger.log_hyperparams(redact(dict(recipe)))

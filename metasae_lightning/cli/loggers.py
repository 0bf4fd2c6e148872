"""The default loggers: CSV, and TensorBoard with one TensorBoard run for each arm, so that one plot shows all arms."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class TensorBoardByArm(TensorBoardLogger):
    """Metrics named `ARM/NAME` go into the TensorBoard run of that arm as `NAME`; all others into the folder itself.

    Args:
        save_dir: The run's folder.
        arms: The arms' names.
    """

    def __init__(self, save_dir: str | Path, arms: Sequence[str]) -> None:
        super().__init__(str(save_dir), name="tensorboard", version="")
        self._loggers = {arm: TensorBoardLogger(str(save_dir), name="tensorboard", version=arm) for arm in arms}

    def of(self, arm: str) -> TensorBoardLogger:
        """The logger of an arm."""
        return self._loggers[arm]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log each metric to the run of its arm."""
        rest = dict(metrics)
        for arm, logger in self._loggers.items():
            of_arm = {key: rest.pop(key) for key in list(rest) if key.startswith(f"{arm}/")}
            if of_arm:
                logger.log_metrics({key.removeprefix(f"{arm}/"): value for key, value in of_arm.items()}, step)
        if rest:
            super().log_metrics(rest, step)

    def finalize(self, status: str) -> None:
        """Flush and close the TensorBoard writers of the arms and of the folder itself."""
        for logger in self._loggers.values():
            logger.finalize(status)
        super().finalize(status)


def default_loggers(run: str, arms: Sequence[str] = ()) -> list[Any]:
    """CSV and TensorBoard loggers, which need no account; with arms, TensorBoard has one run for each.

    An existing `metrics.csv` is renamed to `metrics.1.csv`, or the next free number.
    """
    # Lightning's CSV logger deletes an existing file: a resumed run keeps the earlier part under another name.
    earlier = Path(run) / "metrics.csv"
    if earlier.exists() and not rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
        part = next(i for i in range(1, 10_000) if not earlier.with_name(f"metrics.{i}.csv").exists())
        earlier.rename(earlier.with_name(f"metrics.{part}.csv"))
    return [
        CSVLogger(run, name="", version=""),
        TensorBoardByArm(run, arms) if arms else TensorBoardLogger(run, name="tensorboard", version=""),
    ]

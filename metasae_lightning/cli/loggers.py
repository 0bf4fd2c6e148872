"""Where a run logs to: CSV, and TensorBoard with a run for each arm, so that arms lie over each other in one plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class ArmBoards(TensorBoardLogger):
    """Figures that begin with an arm's name go into that arm's run, without it; others into the folder itself.

    Args:
        save_dir: The run's directory.
        arms: The arms' names.
    """

    def __init__(self, save_dir: str | Path, arms: Sequence[str]) -> None:
        super().__init__(str(save_dir), name="tensorboard", version="")
        self._boards = {arm: TensorBoardLogger(str(save_dir), name="tensorboard", version=arm) for arm in arms}

    def of(self, arm: str) -> TensorBoardLogger:
        """An arm's run."""
        return self._boards[arm]

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Each figure where it belongs."""
        left = dict(metrics)
        for arm, board in self._boards.items():
            own = {key: left.pop(key) for key in list(left) if key.startswith(f"{arm}/")}
            if own:
                board.log_metrics({key.removeprefix(f"{arm}/"): value for key, value in own.items()}, step)
        if left:
            super().log_metrics(left, step)

    def finalize(self, status: str) -> None:
        """Write what is left."""
        for board in self._boards.values():
            board.finalize(status)
        super().finalize(status)


def loggers(run: str, arms: Sequence[str] = ()) -> list[Any]:
    """The default loggers, which need no account; TensorBoard's has a run for each arm."""
    # Lightning's CSV logger deletes the file that is there: a resumed run keeps the earlier part beside it.
    earlier = Path(run) / "metrics.csv"
    if earlier.exists() and not rank_zero_only.rank:  # pyright: ignore[reportFunctionMemberAccess]
        part = next(i for i in range(1, 10_000) if not earlier.with_name(f"metrics.{i}.csv").exists())
        earlier.rename(earlier.with_name(f"metrics.{part}.csv"))
    return [CSVLogger(run, name="", version=""), ArmBoards(run, arms) if arms else TensorBoardLogger(run, name="tensorboard", version="")]

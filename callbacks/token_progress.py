"""Progress bar in tokens."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from metasae_lightning.step import StepOutput


class TokenProgress(ProgressBar):
    """Show tokens of the budget, tokens per second, loss, FVU, L0, dead latents and penalties.

    Args:
        every: Steps between two refreshes; a refresh waits for the device.
        line_seconds: Seconds between two lines, if the output is not a terminal.
    """

    def __init__(self, every: int = 5, line_seconds: float = 20.0) -> None:
        super().__init__()
        self.every, self.line_seconds = every, line_seconds
        self._bar: tqdm[Any] | None = None
        self._enabled = True
        self._began = self._said = 0.0
        self._start = 0

    def disable(self) -> None:
        """Turn the bar off; Lightning does so on other ranks."""
        self._enabled = False

    def enable(self) -> None:
        """Turn the bar on."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the current token count."""
        total = getattr(getattr(trainer, "datamodule", None), "tokens", None)
        self._start = self._tokens(trainer, pl_module)
        self._began = self._said = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=self._start, unit="tok", unit_scale=True, disable=not (self._enabled and terminal), leave=True
        )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the bar, or print a line."""
        now = time.monotonic()
        due = now - self._said >= self.line_seconds or trainer.is_last_batch
        if not self._enabled or self._bar is None or not (due or batch_idx % self.every == 0):
            return
        tokens = self._tokens(trainer, pl_module)
        text = describe(outputs["output"])
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(tokens - self._bar.n)
        elif due:
            self._said = now
            speed = (tokens - self._start) / max(now - self._began, 1e-9)
            budget = f" of {self._bar.total:,}" if self._bar.total else ""
            sys.stderr.write(f"{tokens:,}{budget} tokens, {speed:,.0f}/s, {text}\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()

    @staticmethod
    def _tokens(trainer: Trainer, pl_module: Any) -> int:
        return pl_module.rows_seen


def describe(output: StepOutput | Mapping[str, StepOutput]) -> str:
    """Metrics of a step in one line; for several arms, FVU alone."""
    if isinstance(output, Mapping):
        found = {name: float(own.primary.fvu) for name, own in output.items()}
        if len(found) > 4:  # the line has room for this many
            return f"fvu {min(found.values()):.3f} to {max(found.values()):.3f} of {len(found)} arms"
        return "fvu " + ", ".join(f"{name} {fvu:.3f}" for name, fvu in found.items())
    parts = [f"loss {output.loss:.4g}", f"fvu {output.primary.fvu:.3f}", f"l0 {output.primary.l0:.1f}", f"dead {output.primary.dead:.1%}"]
    return ", ".join(parts + [f"{name} {value:.4f}" for name, value in output.penalties.items()])

"""A progress bar in tokens."""

import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from metasae_lightning.step import StepOutput


class TokenProgress(ProgressBar):
    """Show the tokens trained on, the token budget, tokens per second, and each step's loss, FVU, L0, dead latents and penalties.

    In a meta phase that takes longer than the time between two lines, the number of the meta step is shown.
    With several arms (`SideBySide`) only the FVU is shown: that of each arm, or the range over more than four arms.

    Args:
        every: Number of steps between two refreshes; each refresh waits for the device to finish the step.
        line_seconds: Seconds between two lines of text, which are written instead of a bar where the output is no terminal.
    """

    def __init__(self, every: int = 5, line_seconds: float = 20.0) -> None:
        super().__init__()
        self.every, self.line_seconds = every, line_seconds
        self._bar: tqdm[Any] | None = None
        self._enabled = True
        self._started_at = self._written_at = 0.0
        self._tokens_before = 0
        self._meta_steps = Counter[str]()
        self._hooks: list[Any] = []

    def disable(self) -> None:
        """Write nothing: Lightning calls this on every rank but rank zero."""
        self._enabled = False

    def enable(self) -> None:
        """Write again after `disable`."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open the bar; a resumed run's bar begins at its number of tokens so far."""
        total = getattr(getattr(trainer, "datamodule", None), "tokens", None)
        self._tokens_before = pl_module.rows_seen
        self._started_at = self._written_at = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=self._tokens_before, unit="tok", unit_scale=True, disable=not (self._enabled and terminal), leave=True
        )
        for name, arm in getattr(pl_module, "arms", {"": pl_module}).items() if self._enabled else ():
            for optimizer in optimizers_of(getattr(arm, "meta", None), trainer.optimizers):
                self._hooks.append(optimizer.register_step_post_hook(partial(self._on_meta_step, pl_module, name, arm.n_m)))

    def _on_meta_step(self, pl_module: Any, name: str, n_m: int, *_: Any) -> None:
        """Show the position in a meta phase that takes long, such as the only one of a sequential run."""
        self._meta_steps[name] += 1
        now, on_bar = time.monotonic(), self._bar is not None and not self._bar.disable
        if now - self._written_at < (min(1.0, self.line_seconds) if on_bar else self.line_seconds):
            return
        self._written_at = now
        text = f"{name} meta step {self._meta_steps[name]:,} of {n_m:,}".strip()
        if on_bar:
            self._bar.set_postfix_str(text)  # pyright: ignore[reportOptionalMemberAccess]
        else:
            sys.stderr.write(f"{pl_module.rows_seen:,} tokens, {text}\n")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar, or write a line where the output is no terminal."""
        self._meta_steps.clear()
        now = time.monotonic()
        due = now - self._written_at >= self.line_seconds or trainer.is_last_batch
        if not self._enabled or self._bar is None or not (due or batch_idx % self.every == 0):
            return
        if self._bar.disable and not due:
            return  # the text would wait for the device, and nobody would read it
        tokens = pl_module.rows_seen
        text = describe(outputs["output"])
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(tokens - self._bar.n)
            self._written_at = now
        elif due:
            self._written_at = now
            speed = (tokens - self._tokens_before) / max(now - self._started_at, 1e-9)
            budget = f" of {self._bar.total:,}" if self._bar.total else ""
            sys.stderr.write(f"{tokens:,}{budget} tokens, {speed:,.0f}/s, {text}\n")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        while self._hooks:
            self._hooks.pop().remove()
        if self._bar is not None:
            self._bar.close()


def optimizers_of(module: nn.Module | None, optimizers: Iterable[Optimizer]) -> list[Optimizer]:
    """Those of the optimisers that train a module's parameters; none where there is no module."""
    parameters = set[int]() if module is None else {id(parameter) for parameter in module.parameters()}
    return [optimizer for optimizer in optimizers if id(optimizer.param_groups[0]["params"][0]) in parameters]


def describe(output: StepOutput | Mapping[str, StepOutput]) -> str:
    """One line about a training step: loss, FVU, L0, dead latents and penalties; for arms only the FVU, as a range for more than 4 arms."""
    if isinstance(output, Mapping):
        fvu = {name: float(arm.primary.fvu) for name, arm in output.items()}
        if len(fvu) > 4:  # the values of more arms do not fit in a line
            return f"training fvu {min(fvu.values()):.3f} to {max(fvu.values()):.3f} of {len(fvu)} arms"
        return "training fvu " + ", ".join(f"{name} {value:.3f}" for name, value in fvu.items())
    parts = [
        f"training loss {output.loss:.4g}",
        f"fvu {output.primary.fvu:.3f}",
        f"l0 {output.primary.l0:.1f}",
        f"dead {output.primary.dead:.1%}",
    ]
    return ", ".join(parts + [f"{name} {value:.4f}" for name, value in output.penalties.items()])

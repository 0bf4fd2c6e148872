"""The table at the end of training or testing, and the same figures in `evaluation.json`."""

import io
import json
import math
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME as TERMINAL

from metasae_lightning.errors import InputError
from metasae_lightning.saelens import ExportRecord

MEASURES = {
    "fvu": "variance unexplained",
    "l0": "latents active per row",
    "dead": "dead latents",
    "mcc": "features recovered (MCC)",
}


class Summary(Callback):
    """Print what a run came to, and keep it in the run's directory under the split it was measured on."""

    def __init__(self) -> None:
        self._began = 0.0
        self._rows_before = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began, self._rows_before = time.monotonic(), int(pl_module.primary.rows_seen)  # pyright: ignore

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table of the run, on validation tokens."""
        module: Any = pl_module
        seconds = time.monotonic() - self._began
        rows = int(module.primary.rows_seen)
        speed = (rows - self._rows_before) * trainer.world_size / max(seconds, 1e-9)
        run = {"tokens": rows * trainer.world_size, "seconds": round(seconds, 1), "tokens_per_second": round(speed, 1)}
        self._finish(trainer, "validation", "val", {**run, "exported": exported(trainer)})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table on test tokens."""
        self._finish(trainer, "test", "test", {})

    def _finish(self, trainer: Trainer, split: str, prefix: str, more: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
        kept = {name.split("/", 1)[1]: value for name, value in figures.items() if name.startswith(f"{prefix}/")}
        meta = {name.split("/", 1)[1]: value for name, value in figures.items() if name.startswith("meta/")}
        penalties = {name.split("/", 1)[1]: value for name, value in figures.items() if name.startswith("penalty/")}
        entry = {"primary": kept, "meta": meta, "penalties": penalties, **more}
        path = Path(trainer.default_root_dir) / "evaluation.json"
        keep(path, split, entry)
        Console().print(table(split, entry, str(trainer.default_root_dir)))


def exported(trainer: Trainer) -> dict[str, Any]:
    """What the exported folders were found to do, where something exported."""
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:  # pyright: ignore
        records: Mapping[str, ExportRecord] = getattr(callback, "records", {})
        found |= {role: asdict(record) for role, record in records.items()}
    return found


def keep(path: Path, split: str, entry: dict[str, Any]) -> None:
    """Add an entry to the run's record without losing the others."""
    try:
        record = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} cannot be read, and would be written over: move it away ({error})") from error
    record[split] = entry
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.parent.mkdir(parents=True, exist_ok=True)
    draft.write_text(json.dumps(finite(record), indent=2) + "\n")
    draft.replace(path)


def finite(entry: Any) -> Any:
    """With null for what is no number: JSON has none.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(entry, Mapping):
        return {key: finite(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [finite(value) for value in entry]
    return None if isinstance(entry, float) and not math.isfinite(entry) else entry


def table(split: str, entry: Mapping[str, Any], run: str) -> Table:
    """An entry as people read it."""
    shown = Table(title=f"{run}, {split} tokens", title_justify="left", show_edge=False, pad_edge=False)
    shown.add_column("")
    exports = entry.get("exported", {})
    columns: list[tuple[str, Mapping[str, Any]]] = [("primary", entry["primary"])]
    columns += [(f"{role}, exported", exports[role]) for role in ("primary",) if role in exports]
    columns += [("meta", entry["meta"])] if entry["meta"] else []
    columns += [("meta, exported", exports["meta"])] if "meta" in exports else []
    for name, _ in columns:
        shown.add_column(name, justify="right")
    for key, words in MEASURES.items():
        values = [figures.get(key) for _, figures in columns]
        if any(value is not None for value in values):
            shown.add_row(words, *(said(key, value) for value in values))
    for name, value in entry["penalties"].items():
        shown.add_row(f"penalty {name}", f"{value:.4f}", *[""] * (len(columns) - 1))
    if "tokens" in entry:
        blank = [""] * (len(columns) - 1)
        shown.add_row("tokens trained on", f"{entry['tokens']:,}", *blank)
        shown.add_row("tokens per second", f"{entry['tokens_per_second']:,.0f}", *blank)
    return shown


def picture(run: str | Path, svg: str | Path, split: str = "validation") -> None:
    """The table of a finished run as an SVG that needs nothing from elsewhere."""
    entry = json.loads((Path(run) / "evaluation.json").read_text())[split]
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(table(split, entry, Path(run).name))
    drawn = console.export_svg(title=f"metasae fit: {entry['seconds']:.0f} s of training", theme=TERMINAL)
    # rich would have the font fetched from a server.
    Path(svg).write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))


def said(key: str, value: float | None) -> str:
    """A figure with the digits that mean something."""
    if value is None:
        return ""
    return f"{value:.1%}" if key == "dead" else f"{value:.2f}" if key == "l0" else f"{value:.4f}"

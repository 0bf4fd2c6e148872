"""The table at the end of training or testing, and the same figures in `evaluation.json`."""

import io
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

from metasae_lightning.report.number_format import format_value
from metasae_lightning.run_folder import add_entry, arm_record, read_record, record_file
from metasae_lightning.sae.export import ExportRecord
from metasae_lightning.training.arm_callbacks import per_arm_views

MEASURES = {
    "fvu": "variance unexplained",
    "l0": "latents active per row",
    "dead": "dead latents",
    "mcc": "features recovered (MCC)",
}

# Format of figures other than L0 and dead latents.
DIGITS = ".4f"


class Summary(Callback):
    """Print the results of a run, and store them in `evaluation.json` under the split; results of each arm under its name."""

    def __init__(self) -> None:
        self._began = 0.0
        self._rows_before = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._began, self._rows_before = time.monotonic(), pl_module.rows_seen

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print and store the results on validation tokens."""
        seconds, rows = time.monotonic() - self._began, pl_module.rows_seen
        speed = (rows - self._rows_before) / max(seconds, 1e-9)
        run = {"tokens": rows, "seconds": round(seconds, 1), "tokens_per_second": round(speed, 1)}
        self._finish(trainer, pl_module, "validation", "val", run)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and store the results on test tokens."""
        self._finish(trainer, pl_module, "test", "test", {})

    def _finish(self, trainer: Trainer, pl_module: Any, split: str, prefix: str, run: dict[str, Any]) -> None:
        if not trainer.is_global_zero:
            return
        path, console = record_file(Path(trainer.default_root_dir)), Console()
        found: dict[str, dict[str, Any]] = {}
        for name, (own, _) in per_arm_views(trainer, pl_module).items():
            found[name] = {**grouped(own.callback_metrics, prefix), **run}
            if split == "validation":
                found[name]["exported"] = exported(own)
            add_entry(path, split, found[name], arm=name)
        for name, why in getattr(pl_module, "stopped", {}).items():
            add_entry(path, split, {"stopped": why, **run}, arm=name)
            console.print(f"{name} has stopped: {why}", markup=False)
        root = str(trainer.default_root_dir)
        if found:
            console.print(table(split, found[""], root) if "" in found else arms_table(split, found, root))


def grouped(metrics: Mapping[str, Any], prefix: str) -> dict[str, dict[str, float]]:
    """Logged metrics by group (split, meta SAE, penalties), without their prefixes."""
    kinds = {"primary": f"{prefix}/", "meta": "meta/", "penalties": "penalty/"}
    return {
        kind: {name.removeprefix(start): float(value) for name, value in metrics.items() if name.startswith(start)}
        for kind, start in kinds.items()
    }


def exported(trainer: Any) -> dict[str, Any]:
    """Measurements of the exported SAEs, if there are exports."""
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:
        records: Mapping[str, ExportRecord] = getattr(callback, "records", {})
        found |= {role: asdict(record) for role, record in records.items()}
    return found


def table(split: str, entry: Mapping[str, Any], run: str) -> Table:
    """A table of one entry."""
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
            shown.add_row(words, *(format_value(key, value, DIGITS) for value in values))
    for name, value in entry["penalties"].items():
        shown.add_row(f"penalty {name}", f"{value:.4f}", *[""] * (len(columns) - 1))
    if "tokens" in entry:
        blank = [""] * (len(columns) - 1)
        shown.add_row("tokens trained on", f"{entry['tokens']:,}", *blank)
        shown.add_row("tokens per second", f"{entry['tokens_per_second']:,.0f}", *blank)
    return shown


def arms_table(split: str, entries: Mapping[str, Mapping[str, Any]], run: str) -> Table:
    """A table with a line for each arm."""
    first = next(iter(entries.values()))
    pace = f"; {first['tokens']:,} trained on, {first['tokens_per_second']:,.0f} a second" if "tokens" in first else ""
    shown = Table(title=f"{run}, {split} tokens{pace}", title_justify="left", show_edge=False, pad_edge=False)
    measures = {key: words for key, words in MEASURES.items() if any(key in entry["primary"] for entry in entries.values())}
    penalties = list(dict.fromkeys(name for entry in entries.values() for name in entry["penalties"]))
    whole = any("primary" in entry.get("exported", {}) for entry in entries.values())
    for column in ("", *measures.values(), *(f"penalty {name}" for name in penalties), *(("exported, active per row",) if whole else ())):
        shown.add_column(column, justify="right" if column else "left")
    for name, entry in entries.items():
        cells = [format_value(key, entry["primary"].get(key), DIGITS) for key in measures]
        cells += [format_value("penalty", entry["penalties"].get(penalty), DIGITS) for penalty in penalties]
        cells += [format_value("l0", entry.get("exported", {}).get("primary", {}).get("l0"), DIGITS)] if whole else []
        shown.add_row(name, *cells)
    return shown


def picture(run: str | Path, svg: str | Path, split: str = "validation") -> None:
    """Save the table of a finished run as a self-contained SVG."""
    record = read_record(record_file(Path(run)))
    arms = {name: own for name in record.get("arms", {}) if "primary" in (own := arm_record(record, name).get(split, {}))}
    entry = next(iter(arms.values())) if arms else record[split]
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(arms_table(split, arms, Path(run).name) if arms else table(split, entry, Path(run).name))
    drawn = console.export_svg(title=f"metasae fit: {entry['seconds']:.0f} s of training", theme=TERMINAL)
    # rich's SVG would load a font from a server.
    Path(svg).write_text(re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.DOTALL))

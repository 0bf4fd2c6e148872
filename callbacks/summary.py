"""The table printed at the end of training and of a test, and the same measures in the run's JSON record."""

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

from metasae_lightning.callbacks.logger_media import log_row, media_loggers
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
    """Print the measures of a run as a table and add them to the run's JSON record: one entry for each split (`validation` or `test`).

    A run of several SAEs side by side (arms) has an entry for each split of each arm. The table of validation
    tokens is printed at the end of training, that of test tokens at the end of a test. Its values are those that other callbacks logged
    last: `val/...` or `test/...` of the primary SAE, `meta/...` of the meta SAE and `penalty/...`.
    """

    def __init__(self) -> None:
        self._started_at = 0.0
        self._tokens_before = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock and note the token count: a resumed run's speed leaves out the tokens of earlier runs."""
        self._started_at, self._tokens_before = time.monotonic(), pl_module.rows_seen

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Print and record the measures on validation tokens, with the run's tokens and speed."""
        seconds, tokens = time.monotonic() - self._started_at, pl_module.rows_seen
        speed = (tokens - self._tokens_before) / max(seconds, 1e-9)
        run = {"tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": round(speed, 1)}
        self._finish(trainer, pl_module, "validation", "val", run)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and record the measures on test tokens."""
        self._finish(trainer, pl_module, "test", "test", {})

    def _finish(self, trainer: Trainer, pl_module: Any, split: str, prefix: str, run: dict[str, Any]) -> None:
        """On rank zero, at the end of training or of a test: add each arm's measures to the JSON record and print the table.

        An arm that was stopped is recorded with its reason. After training, an entry also holds the records of the exported SAEs.
        """
        if not trainer.is_global_zero:
            return
        path, console = record_file(Path(trainer.default_root_dir)), Console()
        entries: dict[str, dict[str, Any]] = {}
        for name, (arm_trainer, _) in per_arm_views(trainer, pl_module).items():
            entries[name] = {**group_metrics(arm_trainer.callback_metrics, prefix), **run}
            if split == "validation":
                entries[name]["exported"] = export_records(arm_trainer)
            add_entry(path, split, entries[name], arm=name)
            for logger in media_loggers(arm_trainer):
                log_row(logger, f"summary/{split}", table_row(name, entries[name]))
        for name, reason in getattr(pl_module, "stopped", {}).items():
            add_entry(path, split, {"stopped": reason, **run}, arm=name)
            console.print(f"{name} has stopped: {reason}", markup=False)
        root = str(trainer.default_root_dir)
        if entries:
            console.print(table(split, entries[""], root) if "" in entries else arms_table(split, entries, root))


def group_metrics(metrics: Mapping[str, Any], prefix: str) -> dict[str, dict[str, float]]:
    """Logged metrics in three groups without prefixes: the primary SAE's under `prefix`, the meta SAE's, and the penalties'."""
    kinds = {"primary": f"{prefix}/", "meta": "meta/", "penalties": "penalty/"}
    return {
        kind: {name.removeprefix(start): float(value) for name, value in metrics.items() if name.startswith(start)}
        for kind, start in kinds.items()
    }


def export_records(trainer: Any) -> dict[str, Any]:
    """The record of each SAE that the `Export` callback wrote, by role; empty where the run has no such callback."""
    by_role: dict[str, Any] = {}
    for callback in trainer.callbacks:
        records: Mapping[str, ExportRecord] = getattr(callback, "records", {})
        by_role |= {role: asdict(record) for role, record in records.items()}
    return by_role


def table_row(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one arm as a row for loggers: every measure of the primary and the meta SAE, penalties, exports, tokens and speed.

    >>> table_row("joint", {"primary": {"fvu": 0.2}, "meta": {}, "penalties": {"d": 0.1}, "tokens": 8})
    {'arm': 'joint', 'primary/fvu': 0.2, 'penalties/d': 0.1, 'tokens': 8}
    """
    groups = {key: entry[key] for key in ("primary", "meta", "penalties")}
    groups |= {f"exported/{role}": record for role, record in entry.get("exported", {}).items()}
    figures = {f"{group}/{key}": value for group, values in groups.items() for key, value in values.items()}
    numbers = {key: value for key, value in {**figures, **entry}.items() if isinstance(value, int | float)}
    return {**({"arm": name} if name else {}), **numbers}


def table(split: str, entry: Mapping[str, Any], run: str) -> Table:
    """The table of one SAE's `entry`, titled `run`: a row for each measure, columns for primary and meta, in training and as exported."""
    result = Table(title=f"{run}, {split} tokens", title_justify="left", show_edge=False, pad_edge=False)
    result.add_column("")
    exports = entry.get("exported", {})
    columns: list[tuple[str, Mapping[str, Any]]] = [("primary", entry["primary"])]
    columns += [(f"{role}, exported", exports[role]) for role in ("primary",) if role in exports]
    columns += [("meta", entry["meta"])] if entry["meta"] else []
    columns += [("meta, exported", exports["meta"])] if "meta" in exports else []
    for name, _ in columns:
        result.add_column(name, justify="right")
    for key, words in MEASURES.items():
        values = [figures.get(key) for _, figures in columns]
        if any(value is not None for value in values):
            result.add_row(words, *(format_value(key, value, DIGITS) for value in values))
    for name, value in entry["penalties"].items():
        result.add_row(f"penalty {name}", format_value("penalty", value, DIGITS), *[""] * (len(columns) - 1))
    if "tokens" in entry:
        blank = [""] * (len(columns) - 1)
        result.add_row("tokens trained on", f"{entry['tokens']:,}", *blank)
        result.add_row("tokens per second", f"{entry['tokens_per_second']:,.0f}", *blank)
    return result


def arms_table(split: str, entries: Mapping[str, Mapping[str, Any]], run: str) -> Table:
    """The table of several arms' `entries`, titled `run`: a row for each arm, a column for each measure."""
    first = next(iter(entries.values()))
    pace = f"; {first['tokens']:,} trained on, {first['tokens_per_second']:,.0f} a second" if "tokens" in first else ""
    result = Table(title=f"{run}, {split} tokens{pace}", title_justify="left", show_edge=False, pad_edge=False)
    measures = {key: words for key, words in MEASURES.items() if any(key in entry["primary"] for entry in entries.values())}
    penalties = list(dict.fromkeys(name for entry in entries.values() for name in entry["penalties"]))
    any_exported = any("primary" in entry.get("exported", {}) for entry in entries.values())
    for column in (
        "",
        *measures.values(),
        *(f"penalty {name}" for name in penalties),
        *(("exported, active per row",) if any_exported else ()),
    ):
        result.add_column(column, justify="right" if column else "left")
    for name, entry in entries.items():
        cells = [format_value(key, entry["primary"].get(key), DIGITS) for key in measures]
        cells += [format_value("penalty", entry["penalties"].get(penalty), DIGITS) for penalty in penalties]
        cells += [format_value("l0", entry.get("exported", {}).get("primary", {}).get("l0"), DIGITS)] if any_exported else []
        result.add_row(name, *cells)
    return result


def picture(run: str | Path, svg: str | Path, split: str = "validation") -> None:
    """Write the table of a finished run to an SVG file that loads no font or style from a server.

    The title is the training time, which only entries of the split `validation` hold: `test` raises a KeyError.
    """
    record = read_record(record_file(Path(run)))
    arms = {name: arm for name in record.get("arms", {}) if "primary" in (arm := arm_record(record, name).get(split, {}))}
    entry = next(iter(arms.values())) if arms else record[split]
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(arms_table(split, arms, Path(run).name) if arms else table(split, entry, Path(run).name))
    image = console.export_svg(title=f"metasae fit: {entry['seconds']:.0f} s of training", theme=TERMINAL)
    # rich writes a rule that fetches its font from a server.
    Path(svg).write_text(re.sub(r"@font-face \{.*?\}", "", image, flags=re.DOTALL))

"""Runs taken together: what they come to, written as a page, figures and tables."""

import csv
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metasae_lightning import run_folder
from metasae_lightning.atomic_files import draft_of
from metasae_lightning.errors import InputError
from metasae_lightning.report import figures
from metasae_lightning.report.conclusions import FIGURES, Beside, Verdict, beside_the_paper, verdict
from metasae_lightning.report.html_page import page
from metasae_lightning.report.latent_browser import browsed_latents, read_decoder
from metasae_lightning.report.load_runs import Arm, gather
from metasae_lightning.report.seeds import Group, baseline, difference, grouped, headline

# A page that opens on a phone, in bytes.
LARGEST = 4_900_000
# Latents of an arm that are tried first.
MOST = 10_000


@dataclass(frozen=True)
class Study:
    """Everything that is said of some runs."""

    title: str
    """What the page calls it."""
    groups: list[Group]
    """Arms, those of one recipe together."""
    verdict: Verdict
    """The answer."""
    table: list[Beside]
    """The paper's table with ours."""

    @property
    def arms(self) -> list[Arm]:
        """All of them."""
        return [arm for group in self.groups for arm in group.arms]

    @property
    def browsed(self) -> list[Arm]:
        """The arms whose latents the page shows: one of the baseline, one of those that the verdict is about."""
        base = baseline(self.groups)
        told = headline(self.groups, base) if base else None
        return [group.first for group in (base, told) if group is not None]

    def rows(self) -> list[dict[str, Any]]:
        """A line an arm, with every figure and interval."""
        found: list[dict[str, Any]] = []
        for group in self.groups:
            for arm in group.arms:
                row: dict[str, Any] = {"arm": arm.name, "group": group.name, "seed": arm.seed, "place": str(arm.place)}
                entry = arm.entry or {}
                for kind, of in (entry.get("figures") or {}).items():
                    row |= {f"{kind}/{name}": value for name, value in of.items() if isinstance(value, int | float)}
                for name, (low, high) in (entry.get("intervals") or {}).items():
                    row |= {f"{name}/low": low, f"{name}/high": high}
                found.append(row)
        return found

    def record(self) -> dict[str, Any]:
        """Everything as JSON has it."""
        base, changes = baseline(self.groups), dict[str, Any]()
        for group in self.groups:
            if base is not None and group is not base:
                of = {path: difference(group, base, path, name) for _, path, name, _, _ in FIGURES}
                changes[group.name] = {path: {**asdict(one), "percent": one.percent} for path, one in of.items() if one is not None}
        return {
            **{"verdict": asdict(self.verdict), "baseline": None if base is None else base.name, "changes": changes},
            **{"arms": self.rows(), "missing": {arm.name: arm.missing for arm in self.arms if arm.missing}},
        }


def study(places: Sequence[str], title: str | None = None) -> Study:
    """What some runs come to."""
    groups = grouped(gather(places))
    return Study(title or ", ".join(Path(place).resolve().name for place in places), groups, verdict(groups), beside_the_paper(groups))


def write(found: Study, out: Path) -> Path:
    """`report.html` and `report/` with figures and tables, each whole or not there; the page's path."""
    if (out / "report").exists() and not (out / "report" / "table.json").exists():
        raise InputError(f"{out / 'report'} is there and no report of ours: move it away, or name another place, --out")
    try:
        # The folder's block ends first: the page is replaced once the folder is.
        with draft_of(out / "report.html") as page_draft, draft_of(out / "report") as draft:
            draft.mkdir()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in another script: SVG needs no glyphs of ours
                drawn = figures.drawn(found.groups)
                for name, figure in drawn.items():
                    figures.save(figure, draft / f"{name}.png")
                    (draft / f"{name}.svg").write_text(figures.svg(figure, alone=True))
                text = fitting(found, drawn)
            tables(found, draft)
            page_draft.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    return out / "report.html"


def fitting(found: Study, drawn: dict[str, Any]) -> str:
    """The page, with as many latents as it can hold."""
    most, decoders = MOST, [read_decoder(arm) for arm in found.browsed]
    while True:
        latents = browsed_latents(found.browsed, decoders, most)
        text = page(found.title, found.groups, found.verdict, found.table, drawn, latents)
        size, held = len(text.encode(errors="replace")), max((len(one["rows"]) for one in latents), default=0)
        if size <= LARGEST or held <= 1:
            return text
        most = min(held - 1, max(1, math.floor(0.9 * held * LARGEST / size)))


def tables(found: Study, folder: Path) -> None:
    """The same numbers for programs."""
    rows = found.rows()
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    run_folder.write_record(folder / "table.json", found.record())

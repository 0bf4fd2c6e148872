"""Write the report of some runs: page, figures and tables."""

import csv
import gc
import math
import warnings
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metasae_lightning import run_folder
from metasae_lightning.atomic_files import draft_of
from metasae_lightning.errors import InputError
from metasae_lightning.report import figure_files, figures, judged_figure
from metasae_lightning.report.conclusions import FIGURES, PaperComparison, Verdict, compare_with_paper, verdict
from metasae_lightning.report.html_page import page
from metasae_lightning.report.judged_scores import score_names, score_rows
from metasae_lightning.report.judged_section import judged_section
from metasae_lightning.report.latent_browser import BrowsedArm, browsed_latents, matches_of_arms, read_decoder
from metasae_lightning.report.latent_data import compressed, detail_files, page_data
from metasae_lightning.report.load_runs import Arm, load_arms
from metasae_lightning.report.seeds import Group, baseline, difference, group_by_recipe, headline
from metasae_lightning.report.split_section import split_section
from metasae_lightning.report.topics import Topics
from metasae_lightning.report.topics_section import topics_section

# Bytes of the page at most, so that it opens on a phone.
MAX_PAGE_BYTES = 4_900_000
# Latents of an arm at most.
MAX_LATENTS = 32_768


@dataclass(frozen=True)
class Study:
    """Results and conclusions of some runs."""

    title: str
    """Title of the page."""
    groups: list[Group]
    """Arms, grouped by recipe."""
    verdict: Verdict
    """The conclusion."""
    paper: list[PaperComparison]
    """The paper's table with our results."""

    @property
    def arms(self) -> list[Arm]:
        """The arms of all groups."""
        return [arm for group in self.groups for arm in group.arms]

    @property
    def browsed(self) -> list[Arm]:
        """Up to two arms whose latents the page shows: the first of the baseline and the first of the group that the verdict is about."""
        base = baseline(self.groups)
        compared = headline(self.groups, base) if base else None
        return [group.first for group in (base, compared) if group is not None]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each arm, with every figure and interval."""
        rows: list[dict[str, Any]] = []
        for group in self.groups:
            for arm in group.arms:
                row: dict[str, Any] = {"arm": arm.name, "group": group.name, "seed": arm.seed, "place": str(arm.folder)}
                entry = arm.entry or {}
                for kind, figures_of_kind in (entry.get("figures") or {}).items():
                    row |= {f"{kind}/{name}": value for name, value in figures_of_kind.items() if isinstance(value, int | float)}
                for name, (low, high) in (entry.get("intervals") or {}).items():
                    row |= {f"{name}/low": low, f"{name}/high": high}
                rows.append(row | score_rows(arm))
        return rows

    def record(self) -> dict[str, Any]:
        """The content of `table.json`."""
        base, changes = baseline(self.groups), dict[str, Any]()
        comparisons = {**{path: name for _, path, name, _, _ in FIGURES}, **{f"judging/{name}": "" for name in score_names(self.groups)}}
        for group in self.groups:
            if base is not None and group is not base:
                estimates = {path: difference(group, base, path, name) for path, name in comparisons.items()}
                changes[group.name] = {
                    path: {**asdict(estimate), "percent": estimate.percent} for path, estimate in estimates.items() if estimate is not None
                }
        return {
            **{"verdict": asdict(self.verdict), "baseline": None if base is None else base.name, "changes": changes},
            **{"arms": self.rows(), "missing": {arm.name: arm.missing for arm in self.arms if arm.missing}},
        }


def study(places: Sequence[str], title: str | None = None) -> Study:
    """Load some runs and draw conclusions from them."""
    groups = group_by_recipe(load_arms(places))
    return Study(title or ", ".join(Path(place).resolve().name for place in places), groups, verdict(groups), compare_with_paper(groups))


def check_destination(out: Path) -> None:
    """Reject a folder that cannot be written to, and one that has a folder `report/` that is not a report."""
    run_folder.check_writable(out, "--out")
    if (out / "report").exists() and not (out / "report" / "table.json").exists():
        raise InputError(f"{out / 'report'} is there and no report of ours: move it away, or name another place, --out")


def write(study: Study, out: Path, *, topics: Mapping[str, Topics] | None = None) -> Path:
    """Write `report.html`, and `report/` with figures and tables; each appears complete or not at all. Returns the page's path.

    Older ones are replaced; a folder `report/` that is not a report is refused. `topics` are those of each arm, by its name.
    """
    check_destination(out)
    try:
        # The folder is replaced before the page, since its block ends first.
        with garbage_collection_off(), draft_of(out / "report.html") as page_draft, draft_of(out / "report") as draft:
            draft.mkdir()
            with ThreadPoolExecutor(1) as pool:
                text, arms_in_files = page_of_limited_size(study, pool.submit(write_figures, study, draft), topics_section(topics or {}))
            write_details(arms_in_files, draft / "latents")
            write_tables(study, draft, topics or {})
            page_draft.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    return out / "report.html"


def page_of_limited_size(study: Study, figure_elements: Future[dict[str, str]], topics: str = "") -> tuple[str, Sequence[BrowsedArm]]:
    """The page, and the arms whose latents' details must lie in files beside it, because the page would be larger than `MAX_PAGE_BYTES`.

    If even the list of latents is too large, the page has fewer latents. `figure_elements` is awaited after the latents were described.
    `topics` is the section on topics.
    """
    limit, decoders, with_details = MAX_LATENTS, [read_decoder(arm) for arm in study.browsed], True
    first, *compared = [*study.browsed, None][:2]
    splits = split_section(first, [arm for arm in [*compared, *study.arms] if arm is not None])
    matches = matches_of_arms(decoders)
    while True:
        arms = browsed_latents(study.browsed, decoders, matches, limit)
        latent_data = compressed(page_data(arms, with_details=with_details)) if arms else ""
        elements, files = figure_elements.result(), not with_details
        judged = judged_section(study.groups, elements.get("judged", "")) + splits + topics
        text = page(study.title, study.groups, study.verdict, study.paper, elements, latent_data, judged=judged, reads_files=files)
        size, count = len(text.encode(errors="replace")), max((len(arm.latents) for arm in arms), default=0)
        if size <= MAX_PAGE_BYTES or (not with_details and count <= 1):
            return text, [] if with_details else arms
        if not with_details:
            limit = min(count - 1, max(1, math.floor(0.9 * count * MAX_PAGE_BYTES / size)))
        with_details = False


def write_details(arms: Sequence[BrowsedArm], folder: Path) -> None:
    """Write the scripts with the details of latents; nothing without arms."""
    if arms:
        folder.mkdir()
    for name, content in detail_files(arms):
        (folder / name).write_text(content)


def write_figures(study: Study, folder: Path) -> dict[str, str]:
    """Write each figure as SVG and PNG. Returns the SVG elements for the page, by name."""
    elements: dict[str, str] = {}
    with warnings.catch_warnings():
        # A name may be in a script that the font lacks: an SVG leaves glyphs to the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        pairs = judged_figure.scatter(study.browsed)
        for name, figure in {**figures.draw_all(study.groups), **({} if pairs is None else {"judged": pairs})}.items():
            source = figure_files.svg_source(figure)
            (folder / f"{name}.svg").write_text(figure_files.svg_file(source))
            figure_files.save_png(figure, folder / f"{name}.png")
            elements[name] = figure_files.svg_element(source)
    return elements


@contextmanager
def garbage_collection_off() -> Generator[None]:
    """Turn the cyclic garbage collector off: it would search the many small lists of latents again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def write_tables(study: Study, folder: Path, topics: Mapping[str, Topics]) -> None:
    """Write `table.csv` and `table.json`, the page's numbers for programs."""
    rows = study.rows()
    names = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)
    record = {"topics": {name: merged.record() for name, merged in topics.items()}} if topics else {}
    run_folder.write_record(folder / "table.json", {**study.record(), **record})

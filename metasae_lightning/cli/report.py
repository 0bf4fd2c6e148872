"""The command `report`. It imports neither torch nor Lightning, unless a meta-SAE must be run by SAELens: see `latent_browser.encode`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.console import Console

from metasae_lightning import report

if TYPE_CHECKING:
    from metasae_lightning.report.load_runs import Arm
    from metasae_lightning.report.topics import Topics


def write_report(args: Namespace) -> int:
    """Print the overview and the conclusion of finished runs, then write their page."""
    # Read when NumPy is imported. Figures are drawn beside NumPy's products: a second thread of either waits more than it computes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from metasae_lightning.report.write import check_destination, write

    if args.topics is not None:
        from metasae_lightning.report.topics import check_count

        check_count(args.topics)
    study, out = report.study(args.runs, args.title), Path(args.out or args.runs[0])
    check_destination(out)
    console = Console()
    console.print(report.overview(study))
    if any(arm.judging for arm in study.arms):
        console.print(report.judged_groups(study.groups))
    for arm in study.arms:
        for line in arm.missing:
            console.print(f"{arm.name}: {line}", markup=False, highlight=False)
    console.print(study.verdict.sentence, markup=False, highlight=False)
    for line in study.verdict.beside:
        console.print(line, markup=False, highlight=False)
    topics = {} if args.topics is None else print_topics(study.arms, args.topics, console)
    page = write(study, out, topics=topics)  # the answer is on the terminal while figures are drawn
    console.print(f"the page: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0


def print_topics(arms: Sequence["Arm"], count: int, console: Console) -> "dict[str, Topics]":
    """Print the topics of each arm's latents, or what is missing for them; returns the topics by the arm's name."""
    from metasae_lightning.report.topics import Topics, merge_latents

    found: dict[str, Topics] = {}
    for arm in arms:
        merged = merge_latents(arm.latents, count)
        if isinstance(merged, Topics):
            found[arm.name] = merged
            console.print(report.merged_topics(arm.name, merged))
        else:
            line = f"{arm.name}: no {count} topics: {merged} (metasae test {arm.folder} measures on more text with --tokens)"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    return found

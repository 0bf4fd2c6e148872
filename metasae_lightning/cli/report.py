"""The command `report`. It imports neither torch nor Lightning, unless a meta-SAE must be run by SAELens: see `latent_browser.encode`."""

import os
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console

from metasae_lightning import report


def write_report(args: Namespace) -> int:
    """Print the overview and the conclusion of finished runs, then write their page."""
    # Read when NumPy is imported. Figures are drawn beside NumPy's products: a second thread of either waits more than it computes.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from metasae_lightning.report.write import check_destination, write

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
    page = write(study, out)  # the answer is on the terminal while figures are drawn
    console.print(f"the page: {page}", markup=False, highlight=False, soft_wrap=True)
    return 0

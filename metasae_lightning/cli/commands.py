"""The commands beside LightningCLI's own, by name."""

import logging
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from metasae_lightning import report
from metasae_lightning.cli.arguments import parsed, plain_parser
from metasae_lightning.cli.measure import calibrate, compare, publish, test
from metasae_lightning.report.write import write


def pages(args: Sequence[str]) -> int:
    """Write what runs come to."""
    parser = plain_parser("report", "What was found out about runs, as a page that needs no network, figures and tables; measures nothing.")
    parser.add_argument("runs", nargs="+", type=str, help="Runs, with all their arms, or single arms.")
    parser.add_argument("--out", type=str | None, default=None, help="Where the page goes; none is the run, of several the first.")
    parser.add_argument("--title", type=str | None, default=None, help="What the page is called; none is the runs' names.")
    given = parsed(parser, args)
    found = report.study(given.runs, given.title)
    place = write(found, Path(given.out or given.runs[0]))
    console = Console()
    console.print(report.overview(found))
    for arm in found.arms:
        for what in arm.missing:
            console.print(f"{arm.name}: {what}", markup=False, highlight=False)
    console.print(found.verdict.sentence, markup=False, highlight=False)
    for line in found.verdict.beside:
        console.print(line, markup=False, highlight=False)
    console.print(f"the page: {place}", markup=False, highlight=False, soft_wrap=True)
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    **{"test": test, "calibrate": calibrate, "compare": compare, "report": pages, "publish": publish}
}


def run(args: Sequence[str]) -> int:
    """Run the command that a line names."""
    with telling():
        return COMMANDS[args[0]](args[1:])


def is_ours(args: Sequence[str]) -> bool:
    """Whether a command line is one of these commands', and not LightningCLI's."""
    lightnings = any(word in ("-c", "--config", "--ckpt_path") or word.startswith(("--config=", "--ckpt_path=")) for word in args)
    return bool(args) and args[0] in COMMANDS and not (args[0] == "test" and lightnings)


@contextmanager
def telling() -> Generator[None, None, None]:
    """Say on stderr what is being done."""
    logger, handler = logging.getLogger("metasae_lightning"), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)

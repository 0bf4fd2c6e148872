"""Write the tables of docs/results.md, between `<!-- NAME -->` and `<!-- end -->`, from the files of `metasae report`.

python benchmarks/results.py planted=runs/planted seeds=runs/seeds
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from metasae_lightning.report.conclusions import FIGURES
from metasae_lightning.report.number_format import format_number

ROOT = Path(__file__).parents[1]


def table(record: dict[str, Any]) -> str:
    """A column per group, a line per figure: mean and spread over seeds, and the change against the baseline with its interval."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for arm in record["arms"]:
        groups.setdefault(arm["group"], []).append(arm)
    lines = ["| | " + " | ".join(f"{name}, {len(arms)} seed{'s' * (len(arms) > 1)}" for name, arms in groups.items()) + " |"]
    lines.append("|---" * (1 + len(groups)) + "|")
    for label, path, _, digits, _ in FIGURES:
        cells: list[str] = []
        for name, arms in groups.items():
            values = [arm[path] for arm in arms if isinstance(arm.get(path), int | float)]
            mean = f"{sum(values) / len(values):{digits}}" if values else ""
            spread = math.dist(values, [sum(values) / len(values)] * len(values)) / math.sqrt(len(values) - 1) if len(values) > 1 else None
            change = record["changes"].get(name, {}).get(path)
            percent = None if change is None or not change["base"] else change["percent"]
            change_text = "" if percent is None else f"; {format_number(percent[0], '+.1f')} %" + interval(percent)
            cells.append(mean + (f" ± {spread:{digits}}" if spread is not None else "") + change_text)
        if any(cells):
            lines.append(f"| {label.strip().replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(percent: list[float | None]) -> str:
    """The 95 % interval of a change, in parentheses; empty if there is none."""
    low, high = percent[1:]
    return "" if low is None or high is None else f" ({format_number(low, '+.1f')} to {format_number(high, '+.1f')})"


def main() -> None:
    """Replace the table of each run in the page."""
    page = ROOT / "docs" / "results.md"
    text = page.read_text()
    for name, run in (argument.split("=", 1) for argument in sys.argv[1:]):
        record = json.loads((Path(run) / "report" / "table.json").read_text())
        section = f"<!-- {name} -->\n\n{table(record)}\n\n{record['verdict']['sentence']}\n\n<!-- end -->"
        if not re.search(f"<!-- {name} -->.*?<!-- end -->", text, re.DOTALL):
            sys.exit(f"{page} has no section <!-- {name} --> ... <!-- end -->")
        text = re.sub(f"<!-- {name} -->.*?<!-- end -->", lambda _, section=section: section, text, flags=re.DOTALL)
    page.write_text(text)


if __name__ == "__main__":
    main()

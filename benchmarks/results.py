"""The tables of docs/results.md, from what `metasae report` wrote: between `<!-- NAME -->` and `<!-- end -->`.

python benchmarks/results.py planted=runs/planted seeds=runs/seeds
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from metasae_lightning.report.conclusions import FIGURES

ROOT = Path(__file__).parents[1]


def table(record: dict[str, Any]) -> str:
    """Groups as columns, figures as lines: mean and spread over seeds, and the change against the baseline with its interval."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for arm in record["arms"]:
        groups.setdefault(arm["group"], []).append(arm)
    lines = ["| | " + " | ".join(f"{name}, {len(arms)} seed{'s' * (len(arms) > 1)}" for name, arms in groups.items()) + " |"]
    lines.append("|---" * (1 + len(groups)) + "|")
    for words, path, _, digits, _ in FIGURES:
        cells: list[str] = []
        for name, arms in groups.items():
            values = [arm[path] for arm in arms if isinstance(arm.get(path), int | float)]
            mean = f"{sum(values) / len(values):{digits}}" if values else ""
            spread = math.dist(values, [sum(values) / len(values)] * len(values)) / math.sqrt(len(values) - 1) if len(values) > 1 else None
            change = record["changes"].get(name, {}).get(path)
            percent = None if change is None or not change["base"] else change["percent"]
            told = "" if percent is None else f"; {percent[0]:+.1f} %" + interval(percent)
            cells.append(mean + (f" ± {spread:{digits}}" if spread is not None else "") + told)
        if any(cells):
            lines.append(f"| {words.strip().replace('|', chr(92) + '|')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def interval(percent: list[float | None]) -> str:
    """Where a change lies with 95 %."""
    low, high = percent[1:]
    return "" if low is None or high is None else f" ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """Write each run's table into its place."""
    place = ROOT / "docs" / "results.md"
    text = place.read_text()
    for name, run in (given.split("=", 1) for given in sys.argv[1:]):
        record = json.loads((Path(run) / "report" / "table.json").read_text())
        made = f"<!-- {name} -->\n\n{table(record)}\n\n{record['verdict']['sentence']}\n\n<!-- end -->"
        if not re.search(f"<!-- {name} -->.*?<!-- end -->", text, re.DOTALL):
            sys.exit(f"{place} has no place for {name}")
        text = re.sub(f"<!-- {name} -->.*?<!-- end -->", lambda _, made=made: made, text, flags=re.DOTALL)
    place.write_text(text)


if __name__ == "__main__":
    main()

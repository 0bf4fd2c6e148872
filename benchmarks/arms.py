"""Arms side by side on one stream against a run for each, end to end: `metasae fit` as a process, on the embedded model and text.

    python benchmarks/arms.py                                # the study's twelve arms at 4,608 latents: four kinds, three seeds
    python benchmarks/arms.py --recipe paper_grid --only solo control --tokens 40960

Both do all that a run does: start, load the model, train, validate, export. The arms' weights are then compared bit for bit.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import described
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def fit(run: Path, recipe: str, tokens: int, only: list[str]) -> float:
    """Seconds of a process that trains these arms."""
    sizes = {"tokens": tokens, "validation_tokens": tokens // 4, "buffer_size": min(16384, tokens)}
    data = [f"--data.init_args.{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "-c", "quickstart", "-c", recipe, "--run", str(run), *data]
    began = time.perf_counter()
    done = subprocess.run([*command, f"--only={json.dumps(only)}"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began


def names(recipe: str) -> list[str]:
    """The arms of a recipe."""
    import yaml

    from metasae_lightning.grid import named

    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    return list(named(tree["arms"], tree["grid"]))


def same(one: Path, other: Path, arm: str) -> bool:
    """Whether an arm came to the same SAE in both runs."""
    a, b = (load_file(run / "arms" / arm / "saes" / "primary" / "sae_weights.safetensors") for run in (one, other))
    return a.keys() == b.keys() and all(bool((a[key] == b[key]).all()) for key in a)


def main() -> None:
    """Run, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart_seeds")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/arms.csv"))
    given = parser.parse_args()
    arms: list[str] = given.only or names(given.recipe)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{described()}, fp32: {len(arms)} arms of {given.recipe}, {given.tokens:,} tokens")
    with tempfile.TemporaryDirectory() as folder, given.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "seconds", "same_bits"])
        together = fit(Path(folder) / "together", given.recipe, given.tokens, arms)
        table.writerow(["together", round(together, 1), ""])
        print(f"together: {together:.1f} s", flush=True)
        alone = dict[str, float]()
        for arm in arms:
            alone[arm] = fit(Path(folder) / arm, given.recipe, given.tokens, [arm])
            equal = same(Path(folder) / "together", Path(folder) / arm, arm)
            table.writerow([arm, round(alone[arm], 1), equal])
            print(f"{arm} alone: {alone[arm]:.1f} s, {'the same bits' if equal else 'OTHER BITS'}", flush=True)
        print(f"together / one after the other: {together / sum(alone.values()):.3f}")


if __name__ == "__main__":
    main()

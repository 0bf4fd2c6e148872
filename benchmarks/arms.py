"""Arms side by side on one stream against a run for each, end to end: `metasae fit` as a process, on the embedded model and text.

    python benchmarks/arms.py                                # the study's twelve arms at 4,608 latents: four kinds, three seeds
    python benchmarks/arms.py --recipe paper_grid --only solo control --tokens 40960

Both do all that a run does: start, load the model, train, validate, export. The arms' weights are then compared bit for bit, and the
language model's share is the time of its forward pass, validation's included, in all of this.
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

from end_to_end import Watch
from machine import described
from safetensors.torch import load_file

ROOT, WATCHED = Path(__file__).parents[1], "--watched"


def fit(run: Path, recipe: str, tokens: int, only: list[str]) -> tuple[float, float]:
    """Seconds of a process that trains these arms, and those of them in the language model."""
    sizes = {"tokens": tokens, "validation_tokens": tokens // 4, "buffer_size": min(16384, tokens)}
    data = [f"--data.init_args.{name}={value}" for name, value in sizes.items()]
    words = ["fit", "-c", "quickstart", "-c", recipe, "--run", str(run), *data, f"--only={json.dumps(only)}"]
    began = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, WATCHED, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return time.perf_counter() - began, float(done.stdout.strip().split("\n")[-1])


def watched(words: list[str]) -> int:
    """The command, and last of what it prints the seconds in the language model."""
    from metasae_lightning.cli import main
    from metasae_lightning.lm import HuggingFaceLM
    from metasae_lightning.memory.malloc import keep_freed_blocks

    keep_freed_blocks()  # as the command does for a process of its own
    watch = Watch()
    watch.over(HuggingFaceLM, "activations", watch.model)
    status = main(words)
    print(f"\n{sum(end - began for began, end in watch.model)}")
    return status


def names(recipe: str) -> list[str]:
    """The arms of a recipe."""
    import yaml

    from metasae_lightning.cli.grid import changes_by_arm

    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    return list(changes_by_arm(tree["arms"], tree["grid"]))


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
        table.writerow(["run", "seconds", "model_seconds", "same_bits"])
        together, model = fit(Path(folder) / "together", given.recipe, given.tokens, arms)
        table.writerow(["together", round(together, 1), round(model, 1), ""])
        print(f"together: {together:.1f} s, {model / together:.0%} in the model", flush=True)
        alone = dict[str, tuple[float, float]]()
        for arm in arms:
            alone[arm] = fit(Path(folder) / arm, given.recipe, given.tokens, [arm])
            equal = same(Path(folder) / "together", Path(folder) / arm, arm)
            table.writerow([arm, *(round(seconds, 1) for seconds in alone[arm]), equal])
            print(f"{arm} alone: {alone[arm][0]:.1f} s, {'the same bits' if equal else 'OTHER BITS'}", flush=True)
        apart, models = (sum(seconds) for seconds in zip(*alone.values(), strict=True))
        print(f"one after the other: {apart:.1f} s, {models / apart:.0%} in the model")
        print(f"together / one after the other: {together / apart:.3f}")


if __name__ == "__main__":
    sys.exit(watched(sys.argv[2:]) if sys.argv[1:2] == [WATCHED] else main())

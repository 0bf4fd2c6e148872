"""Time of several arms on one stream, and of one run for each arm: `metasae fit` as a process, on the embedded model and text.

    python benchmarks/arms.py                                # the study's twelve arms at 4,608 latents: four kinds, three seeds
    python benchmarks/arms.py --recipe paper_grid --only solo control --tokens 40960

Every run is complete: start, load the model, train, validate, export. The weights of each arm are then compared bit for bit. The language
model's share is the time of its forward passes, in training and validation, divided by the time of the run.
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

from end_to_end import CallTimer
from machine import machine_description
from safetensors.torch import load_file

ROOT, TIMED = Path(__file__).parents[1], "--watched"


def fit(run: Path, recipe: str, tokens: int, only: list[str]) -> tuple[float, float]:
    """Train these arms in a process: its seconds, and the seconds of these in the language model."""
    sizes = {"tokens": tokens, "validation_tokens": tokens // 4, "buffer_size": min(16384, tokens)}
    data = [f"--data.init_args.{name}={value}" for name, value in sizes.items()]
    command_args = ["fit", "-c", "quickstart", "-c", recipe, "--run", str(run), *data, f"--only={json.dumps(only)}"]
    start = time.perf_counter()
    process = subprocess.run([sys.executable, __file__, TIMED, *command_args], cwd=ROOT, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr)
    return time.perf_counter() - start, float(process.stdout.strip().split("\n")[-1])


def run_timed(command_args: list[str]) -> int:
    """Run the command; the last line of its output is the seconds in the language model."""
    from metasae_lightning.cli import main
    from metasae_lightning.lm import HuggingFaceLM
    from metasae_lightning.memory.malloc import keep_freed_blocks

    keep_freed_blocks()  # as the command does in its own process
    timer = CallTimer()
    timer.record_calls(HuggingFaceLM, "activations", timer.model)
    status = main(command_args)
    print(f"\n{sum(end - start for start, end in timer.model)}")
    return status


def arm_names(recipe: str) -> list[str]:
    """Names of the arms of a recipe."""
    import yaml

    from metasae_lightning.cli.grid import changes_by_arm

    tree: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    return list(changes_by_arm(tree["arms"], tree["grid"]))


def has_same_weights(run_a: Path, run_b: Path, arm: str) -> bool:
    """Whether the primary SAE of an arm has the same bits in both runs."""
    a, b = (load_file(run / "arms" / arm / "saes" / "primary" / "sae_weights.safetensors") for run in (run_a, run_b))
    return a.keys() == b.keys() and all(bool((a[key] == b[key]).all()) for key in a)


def main() -> None:
    """Run the benchmark, print the results and write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart_seeds")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/arms.csv"))
    args = parser.parse_args()
    arms: list[str] = args.only or arm_names(args.recipe)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine_description()}, fp32: {len(arms)} arms of {args.recipe}, {args.tokens:,} tokens")
    with tempfile.TemporaryDirectory() as folder, args.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["run", "seconds", "model_seconds", "same_bits"])
        side_by_side, model = fit(Path(folder) / "together", args.recipe, args.tokens, arms)
        table.writerow(["together", round(side_by_side, 1), round(model, 1), ""])
        print(f"side by side: {side_by_side:.1f} s, {model / side_by_side:.0%} in the model", flush=True)
        times = dict[str, tuple[float, float]]()
        for arm in arms:
            times[arm] = fit(Path(folder) / arm, args.recipe, args.tokens, [arm])
            equal = has_same_weights(Path(folder) / "together", Path(folder) / arm, arm)
            table.writerow([arm, *(round(seconds, 1) for seconds in times[arm]), equal])
            print(f"{arm} alone: {times[arm][0]:.1f} s, {'the same bits' if equal else 'OTHER BITS'}", flush=True)
        total, model_total = (sum(seconds) for seconds in zip(*times.values(), strict=True))
        print(f"one after the other: {total:.1f} s, {model_total / total:.0%} in the model")
        print(f"side by side / one after the other: {side_by_side / total:.3f}")


if __name__ == "__main__":
    sys.exit(run_timed(sys.argv[2:]) if sys.argv[1:2] == [TIMED] else main())

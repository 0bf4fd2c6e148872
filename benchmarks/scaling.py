"""Time of a step by width, k, tokens and d_in, for this project and SAELens; and the time of several arms on one stream.

    python benchmarks/scaling.py                 # everything; the median of three steps, after two warm-up steps
    python benchmarks/scaling.py --parts arms

One size varies at a time, around d_in 576, d_sae 16384, 1,024 tokens and k 32.
"""

import argparse
import csv
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import step
import torch
from machine import machine_description

DEFAULTS = {"d_in": 576, "d_sae": 16384, "tokens": 1024, "k": 32}
SIZES_BY_DIMENSION: dict[str, list[int]] = {
    "d_sae": [2**power for power in range(12, 18)],
    "k": [8, 32, 128, 256],
    "tokens": [256, 1024, 4096],
    "d_in": [288, 576, 1280, 2304],
}
ARMS = (1, 2, 5, 11)


def median_seconds(arm: Any, shape: tuple[int, int], runs: int) -> float:
    """Median time of a step, after two warm-up steps."""
    times = [arm.step(torch.randn(shape))["whole"] for _ in range(runs + 2)][2:]
    return statistics.median(times)


def vary(dimension: str, runs: int, table: Any) -> None:
    """Measure a step for each size of one dimension, with the defaults for the others."""
    for value in SIZES_BY_DIMENSION[dimension]:
        size = {**DEFAULTS, dimension: value}
        step.SIZES["now"] = (size["d_in"], size["d_sae"], size["tokens"], size["k"], 0, 0)
        shape = size["tokens"], size["d_in"]
        seconds = {name: median_seconds(step.ARMS[name]("now"), shape, runs) for name in ("floor", "ours", "saelens")}
        table.writerow([dimension, value, *(round(median, 4) for median in seconds.values())])
        times = ", ".join(f"{name} {median:.3f} s" for name, median in seconds.items())
        print(f"{dimension:7} {value:7,}: {times}; saelens / ours {seconds['saelens'] / seconds['ours']:.2f}", flush=True)


def vary_arms(runs: int, table: Any) -> None:
    """Measure a batch for each number of joint arms of 4,608 latents on one stream, which share the language model's forward pass."""
    from metasae_lightning.lm import HuggingFaceLM
    from metasae_lightning.lm.embedded_model import embedded_folder

    embedded_folder()
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.15.hook_resid_post", device="cpu")
    model.load()
    tokens = torch.randint(0, 40_000, (8, 128))
    step.SIZES["now"] = (576, 4608, 1024, 32, 405, 8)
    arms = [step.ARMS["joint"]("now") for _ in range(max(ARMS))]
    for arm in arms:
        arm.step(torch.randn(1024, 576))
    one_arm = 0.0
    for count in ARMS:
        batch_times, model_times = list[float](), list[float]()
        for _ in range(max(runs, step.MACRO)):  # a macro-step, with its meta phase
            start = time.perf_counter()
            x = model.activations(tokens).flatten(0, 1)
            model_times.append(time.perf_counter() - start)
            for arm in arms[:count]:
                arm.step(x)
            batch_times.append(time.perf_counter() - start)
        seconds, model_fraction = statistics.mean(batch_times), sum(model_times) / sum(batch_times)
        one_arm = one_arm or seconds
        table.writerow(["arms", count, round(seconds, 4), round(model_fraction, 4), ""])
        times = f"{seconds:.3f} s per batch of 1,024 tokens, {seconds / one_arm:.2f} of the time of one arm, model {model_fraction:.0%}"
        print(f"arms {count:3}: {times}", flush=True)


def main() -> None:
    """Run the benchmark, print the results and write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*SIZES_BY_DIMENSION, "arms"], default=[*SIZES_BY_DIMENSION, "arms"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scaling.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine_description()}, fp32: medians of {args.runs} steps; around {DEFAULTS}")
    with args.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["varied", "value", "floor_or_batch", "ours_or_model_share", "saelens"])
        for part in args.parts:
            vary_arms(args.runs, table) if part == "arms" else vary(part, args.runs, table)


if __name__ == "__main__":
    main()

"""How a step grows with width, k, tokens and d_in, beside SAELens's; and what several arms on one stream cost.

    python benchmarks/scaling.py                 # everything; two steps of each are left out, the median of three is kept
    python benchmarks/scaling.py --parts arms

One thing varies at a time, around d_in 576, d_sae 16384, 1,024 tokens and k 32.
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
from machine import described

AROUND = {"d_in": 576, "d_sae": 16384, "tokens": 1024, "k": 32}
VARIED: dict[str, list[int]] = {
    "d_sae": [2**power for power in range(12, 18)],
    "k": [8, 32, 128, 256],
    "tokens": [256, 1024, 4096],
    "d_in": [288, 576, 1280, 2304],
}
ARMS = (1, 2, 5, 11)


def seconds(arm: Any, shape: tuple[int, int], runs: int) -> float:
    """The median step's."""
    times = [arm.step(torch.randn(shape))["whole"] for _ in range(runs + 2)][2:]
    return statistics.median(times)


def vary(what: str, runs: int, table: Any) -> None:
    """One size varied, the others as they are."""
    for value in VARIED[what]:
        size = {**AROUND, what: value}
        step.SIZES["now"] = (size["d_in"], size["d_sae"], size["tokens"], size["k"], 0, 0)
        found = {name: seconds(step.ARMS[name]("now"), (size["tokens"], size["d_in"]), runs) for name in ("floor", "ours", "saelens")}
        table.writerow([what, value, *(round(found[name], 4) for name in found)])
        told = ", ".join(f"{name} {middle:.3f} s" for name, middle in found.items())
        print(f"{what:7} {value:7,}: {told}: {found['saelens'] / found['ours']:.2f} of ours", flush=True)


def arms(runs: int, table: Any) -> None:
    """Joint arms of 4,608 latents on one stream: the language model is paid once."""
    from metasae_lightning.lm import HuggingFaceLM
    from metasae_lightning.lm.embedded_model import embedded_folder

    embedded_folder()
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.15.hook_resid_post", device="cpu")
    model.load()
    tokens = torch.randint(0, 40_000, (8, 128))
    step.SIZES["now"] = (576, 4608, 1024, 32, 405, 8)
    made = [step.ARMS["joint"]("now") for _ in range(max(ARMS))]
    for arm in made:
        arm.step(torch.randn(1024, 576))
    first = 0.0
    for count in ARMS:
        times, models = list[float](), list[float]()
        for _ in range(max(runs, step.MACRO)):  # a macro-step, its meta phase included
            began = time.perf_counter()
            x = model.activations(tokens).flatten(0, 1)
            models.append(time.perf_counter() - began)
            for arm in made[:count]:
                arm.step(x)
            times.append(time.perf_counter() - began)
        whole, share = statistics.mean(times), sum(models) / sum(times)
        first = first or whole
        table.writerow(["arms", count, round(whole, 4), round(share, 4), ""])
        told = f"{whole:.3f} s a batch of 1,024 tokens, {whole / first:.2f} of one arm's, model {share:.0%}"
        print(f"arms {count:3}: {told}", flush=True)


def main() -> None:
    """Run, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*VARIED, "arms"], default=[*VARIED, "arms"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/scaling.csv"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{described()}, fp32: medians of {given.runs} steps; around {AROUND}")
    with given.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["varied", "value", "floor_or_batch", "ours_or_model_share", "saelens"])
        for part in given.parts:
            arms(given.runs, table) if part == "arms" else vary(part, given.runs, table)


if __name__ == "__main__":
    main()

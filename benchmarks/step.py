"""Time of a training step and its parts, solo and joint: this project, SAELens, a dense step in torch, and the encoder's product alone.

    python benchmarks/step.py                          # three sizes, solo and joint, and each arm's peak memory
    python benchmarks/step.py --sizes laptop --runs 3  # minutes

Arms alternate in one process on the same random activations. The time of a joint arm's step is a mean over macro-steps of 10 primary and 5
meta steps.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine_description, peak_mib, save_bar_chart
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from metasae_lightning.training.optimizers import adam

# d_in, d_sae, tokens, k, and the width and k of the meta SAE.
SIZES = {
    "laptop": (576, 4608, 2048, 32, 405, 4),
    "paper-1024": (1280, 20480, 1024, 64, 1800, 8),
    "paper": (1280, 20480, 4096, 64, 1800, 8),
}
MACRO, META = 10, 5
Parts = dict[str, float]


class Clock:
    """A stopwatch for a step and its parts, in seconds."""

    def __init__(self) -> None:
        self.parts: Parts = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, which adds its seconds to the part of that name."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start
            return result

        return run

    def measure(self, step: Callable[[], Any]) -> Parts:
        """Run one step: its time, the times of its parts, and the rest, which is the optimiser and bookkeeping."""
        self.parts = {}
        backward, start = torch.Tensor.backward, time.perf_counter()
        torch.Tensor.backward = self.timed("backward", backward)  # type: ignore[method-assign]
        try:
            step()
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
        whole = time.perf_counter() - start
        return {"whole": whole, **self.parts, "rest": whole - sum(self.parts.values())}


class Ours:
    """`JointSAE.step`."""

    def __init__(self, size: str, *, meta: bool = False, supports: Any = "exact", rows: float = 1.0):
        d_in, d_sae, _, k, d_meta, meta_k = SIZES[size]
        shared: Any = {"decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False}
        self.module = JointSAE(
            BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **shared),
            BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_meta, k=meta_k, **shared) if meta else None,
            {"decomposability": Decomposability(0.3, rows=rows)} if meta else {},
            n_p=MACRO,
            n_m=META,
            b_dec_init="mean",
            dead_after_tokens=10**9,
            critic_supports=supports,
            meta_rows=round(rows * d_sae) if rows < 1 else None,
        )
        self.optimizers = [adam(self.module.primary.parameters()), *([adam(self.module.meta.parameters())] if self.module.meta else [])]
        self.clock = Clock()
        self.module.primary._forward = self.clock.timed("forward", self.module.primary._forward)

    def step(self, x: Tensor) -> Parts:
        """The times of the parts of one step."""
        return self.clock.measure(lambda: self.module.step(Batch(x), *self.optimizers))


class SAELens:
    """`SAETrainer.step`."""

    def __init__(self, size: str):
        d_in, d_sae, tokens, k, _, _ = SIZES[size]
        sae: Any = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=False)
        )
        cfg = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=tokens, lr_end=3e-5, dead_feature_window=10**9)
        self.trainer: Any = SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))
        self.clock = Clock()
        sae.training_forward_pass = self.clock.timed("forward", sae.training_forward_pass)

    def step(self, x: Tensor) -> Parts:
        """The times of the parts of one step."""
        return self.clock.measure(lambda: self.trainer.step(x))


class Dense(nn.Module):
    """The usual step in plain torch: all matrices dense, unit decoder rows, the default Adam."""

    def __init__(self, size: str):
        super().__init__()
        d_in, d_sae, _, self.k, _, _ = SIZES[size]
        rows = nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_enc, self.W_dec = nn.Parameter(rows.T.contiguous()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=3e-4, betas=(0.9, 0.999))
        self.clock = Clock()

    def forward(self, x: Tensor) -> Tensor:
        """The loss."""
        acts = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        largest = acts.flatten().topk(self.k * len(x), sorted=False)
        sparse_acts = torch.zeros_like(acts).flatten().scatter(0, largest.indices, largest.values).view(acts.shape)
        return (sparse_acts @ self.W_dec + self.b_dec - x).square().sum(1).mean()

    def _train(self, x: Tensor) -> None:
        self.clock.timed("forward", self.forward)(x).backward()
        with torch.no_grad():
            gradient: Any = self.W_dec.grad
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
            torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def step(self, x: Tensor) -> Parts:
        """The times of the parts of one step."""
        return self.clock.measure(lambda: self._train(x))


class Floor:
    """The encoder's product alone: a lower bound on the time of any step."""

    def __init__(self, size: str):
        d_in, d_sae, tokens, *_ = SIZES[size]
        self.W_enc, self.out = torch.randn(d_in, d_sae) * d_in**-0.5, torch.empty(tokens, d_sae)
        self.clock = Clock()

    def step(self, x: Tensor) -> Parts:
        """The time of one product."""
        return self.clock.measure(lambda: torch.mm(x, self.W_enc, out=self.out))


ARMS: dict[str, Callable[[str], Any]] = {
    "floor": Floor,
    "ours": Ours,
    "saelens": SAELens,
    "dense": Dense,
    "joint": lambda size: Ours(size, meta=True),
    "joint, supports of the macro-step": lambda size: Ours(size, meta=True, supports="macro_step"),
    "joint, an eighth of the rows": lambda size: Ours(size, meta=True, rows=0.125),
    "joint, a sixteenth of the rows": lambda size: Ours(size, meta=True, rows=0.0625),
}
JOINT = [name for name in ARMS if name.startswith("joint")]


def run(size: str, runs: int, macro_steps: int, only: list[str]) -> dict[str, list[Parts]]:
    """The times of each arm's steps, which alternate; warm-up steps, which allocate memory and optimisers' states, are left out.

    The times of joint arms are means over macro-steps, in which they and the solo arm alternate step by step, so that compared times are
    measured in the same seconds. `ours_beside` is the time of the solo arm's step in that macro-step.
    """
    arms = {name: make(size) for name, make in ARMS.items() if name in only}
    d_in, _, tokens, *_ = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    results: dict[str, list[Parts]] = {name: [] for name in arms}

    def alternate(names: list[str], steps: int) -> dict[str, Parts]:
        times: dict[str, list[Parts]] = {name: [] for name in names}
        for _ in range(steps):
            x = torch.randn(tokens, d_in, generator=generator)
            for name in names:
                times[name].append(arms[name].step(x))
        means = {
            name: {part: sum(parts.get(part, 0.0) for parts in steps_parts) / steps for part in steps_parts[0]}
            for name, steps_parts in times.items()
        }
        ours = means["ours"]["whole"] if "ours" in means else float("nan")
        return {name: {**parts, "ours_beside": ours} for name, parts in means.items()}

    single, joint = [name for name in arms if name not in JOINT], [name for name in arms if name in JOINT]
    solo = [name for name in single if name == "ours" and joint]
    for kind, names, steps, repeats in (("step", single, 1, runs), ("macro-step", [*solo, *joint], MACRO, macro_steps)):
        for index in range(-2 if steps == 1 else -1, repeats if names else -2):
            for name, parts in alternate(names, steps).items():
                if index >= 0 and (name in joint) == (steps > 1):
                    results[name].append(parts)
            print(f"{size}: {kind} {index + 1}", file=sys.stderr, flush=True)
    return results


def run_in_subprocess(arm: str, size: str) -> float:
    """Peak memory of three steps in MiB: the peak resident size of a process with three steps, minus that of one without steps."""
    peaks = []
    for steps in (0, 3):
        command = [sys.executable, __file__, "--arm", arm, "--sizes", size, "--runs", str(steps)]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(process.stdout.strip().split("\n")[-1])["mib"])
    return peaks[1] - peaks[0]


def report(size: str, results: dict[str, list[Parts]], peaks: dict[str, float], table: Any) -> None:
    """Print the rows of one size and write them to the CSV file."""
    for name, times in results.items():
        medians = {part: statistics.median(parts.get(part, 0.0) for parts in times) for part in ("whole", "forward", "backward", "rest")}
        ratios = [parts["whole"] / parts["ours_beside"] for parts in times]
        ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
        row = [size, name, *(round(seconds, 4) for seconds in medians.values()), *(round(x, 3) for x in (ratio, low, high))]
        table.writerow([*row, round(peaks.get(name, 0))])
        part_times = ", ".join(f"{part} {medians[part]:.3f}" for part in ("forward", "backward", "rest"))
        peak = f", peak {peaks[name]:,.0f} MiB" if name in peaks else ""
        relative = f"{ratio:6.2f} of ours ({low:.2f} to {high:.2f})"
        print(f"{size:11} {name:34} {medians['whole']:8.3f} s ({part_times})  {relative}{peak}", flush=True)
    if {"floor", "ours"} <= set(results):
        both_passes = statistics.median(parts["forward"] + parts["backward"] for parts in results["ours"])
        floor = statistics.median(parts["whole"] for parts in results["floor"])
        print(f"{size:11} the encoder's product takes {floor / both_passes:.2f} of the time of our forward and backward", flush=True)


def main() -> None:
    """Run the benchmark, print the results and write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--macro-steps", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if args.arm:
        size = args.sizes[0]
        arm = ARMS[args.arm](size) if args.runs else None
        for _ in range(args.runs):
            arm.step(torch.randn(SIZES[size][2], SIZES[size][0]))
        print(json.dumps({"mib": peak_mib()}))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine_description()}, fp32: medians of {args.runs} alternating steps, joint ones of {args.macro_steps} macro-steps")
    with args.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["size", "arm", "whole", "forward", "backward", "rest", "of_ours", "least", "most", "peak_mib"])
        for size in args.sizes:
            results = run(size, args.runs, args.macro_steps, args.arms)
            peaks = {} if args.no_memory else {name: run_in_subprocess(name, size) for name in args.arms if name != "floor"}
            report(size, results, peaks, table)
            seconds = [statistics.median(parts["whole"] for parts in times) for times in results.values()]
            picture = args.out.with_name(f"{args.out.stem}-{size}.svg")
            save_bar_chart(picture, f"a step, {size}: {machine_description()}", list(results), seconds, "seconds")


if __name__ == "__main__":
    main()

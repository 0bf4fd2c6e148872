"""A training step: ours, SAELens's, a dense one in plain torch, and the encoder's product alone; solo and joint, part by part.

    python benchmarks/step.py                          # three sizes, solo and joint, and each arm's peak memory
    python benchmarks/step.py --sizes laptop --runs 3  # minutes

Arms alternate in one process on the same random activations; a joint arm's step is a mean over macro-steps of 10 primary and 5 meta steps.
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
from machine import described, draw, peak_mib
from sae_lens import BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from metasae_lightning.training.joint import adam

# d_in, d_sae, tokens, k, and the meta SAE's width and k.
SIZES = {
    "laptop": (576, 4608, 2048, 32, 405, 4),
    "paper-1024": (1280, 20480, 1024, 64, 1800, 8),
    "paper": (1280, 20480, 4096, 64, 1800, 8),
}
MACRO, META = 10, 5
Parts = dict[str, float]


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.parts: Parts = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its seconds added up."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - began
            return result

        return run

    def of(self, step: Callable[[], Any]) -> Parts:
        """The parts of one step, what is left the optimiser's and the bookkeeping's."""
        self.parts = {}
        plain, began = torch.Tensor.backward, time.perf_counter()
        torch.Tensor.backward = self.timed("backward", plain)  # type: ignore[method-assign]
        try:
            step()
        finally:
            torch.Tensor.backward = plain  # type: ignore[method-assign]
        whole = time.perf_counter() - began
        return {"whole": whole, **self.parts, "rest": whole - sum(self.parts.values())}


class Ours:
    """`JointSAE.step`."""

    def __init__(self, size: str, *, meta: bool = False, supports: Any = "exact", rows: float = 1.0):
        d_in, d_sae, _, k, m, meta_k = SIZES[size]
        plain: Any = {"decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False}
        self.module = JointSAE(
            BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k, **plain),
            BatchTopKTrainingSAEConfig(d_in=d_in, d_sae=m, k=meta_k, **plain) if meta else None,
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
        """One step's parts."""
        return self.clock.of(lambda: self.module.step(Batch(x), *self.optimizers))


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
        """One step's parts."""
        return self.clock.of(lambda: self.trainer.step(x))


class Dense(nn.Module):
    """The step as it is usually written: everything dense, unit rows, the default Adam."""

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
        best = acts.flatten().topk(self.k * len(x), sorted=False)
        kept = torch.zeros_like(acts).flatten().scatter(0, best.indices, best.values).view(acts.shape)
        return (kept @ self.W_dec + self.b_dec - x).square().sum(1).mean()

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
        """One step's parts."""
        return self.clock.of(lambda: self._train(x))


class Floor:
    """The encoder's product."""

    def __init__(self, size: str):
        d_in, d_sae, tokens, *_ = SIZES[size]
        self.W_enc, self.out = torch.randn(d_in, d_sae) * d_in**-0.5, torch.empty(tokens, d_sae)
        self.clock = Clock()

    def step(self, x: Tensor) -> Parts:
        """One product."""
        return self.clock.of(lambda: torch.mm(x, self.W_enc, out=self.out))


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
    """Seconds of every arm's steps, in turn; first some that pay for pages and for optimisers' states.

    Joint arms' are means over macro-steps, in which they and the solo arm make every step in turn: what is compared was measured in the
    same seconds. `beside` is what the solo arm took then.
    """
    arms = {name: make(size) for name, make in ARMS.items() if name in only}
    d_in, _, tokens, *_ = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[Parts]] = {name: [] for name in arms}

    def turn(names: list[str], steps: int) -> dict[str, Parts]:
        times: dict[str, list[Parts]] = {name: [] for name in names}
        for _ in range(steps):
            x = torch.randn(tokens, d_in, generator=generator)
            for name in names:
                times[name].append(arms[name].step(x))
        means = {name: {part: sum(one.get(part, 0.0) for one in of) / steps for part in of[0]} for name, of in times.items()}
        beside = means["ours"]["whole"] if "ours" in means else float("nan")
        return {name: {**parts, "beside": beside} for name, parts in means.items()}

    single, joint = [name for name in arms if name not in JOINT], [name for name in arms if name in JOINT]
    beside = [name for name in single if name == "ours" and joint]
    for kind, names, steps, turns in (("step", single, 1, runs), ("macro-step", [*beside, *joint], MACRO, macro_steps)):
        for number in range(-2 if steps == 1 else -1, turns if names else -2):
            for name, parts in turn(names, steps).items():
                if number >= 0 and (name in joint) == (steps > 1):
                    found[name].append(parts)
            print(f"{size}: {kind} {number + 1}", file=sys.stderr, flush=True)
    return found


def alone(arm: str, size: str) -> float:
    """The peak resident size of a process that makes three steps, less that of one that imports and makes none."""
    peaks = []
    for steps in (0, 3):
        command = [sys.executable, __file__, "--arm", arm, "--sizes", size, "--runs", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout.strip().split("\n")[-1])["mib"])
    return peaks[1] - peaks[0]


def report(size: str, found: dict[str, list[Parts]], peaks: dict[str, float], table: Any) -> None:
    """One size's rows, on the terminal and as CSV."""
    for name, times in found.items():
        middle = {part: statistics.median(one.get(part, 0.0) for one in times) for part in ("whole", "forward", "backward", "rest")}
        ratios = [one["whole"] / one["beside"] for one in times]
        ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
        row = [size, name, *(round(seconds, 4) for seconds in middle.values()), *(round(x, 3) for x in (ratio, low, high))]
        table.writerow([*row, round(peaks.get(name, 0))])
        parts = ", ".join(f"{part} {middle[part]:.3f}" for part in ("forward", "backward", "rest"))
        peak = f", peak {peaks[name]:,.0f} MiB" if name in peaks else ""
        told = f"{ratio:6.2f} of ours ({low:.2f} to {high:.2f})"
        print(f"{size:11} {name:34} {middle['whole']:8.3f} s ({parts})  {told}{peak}", flush=True)
    if {"floor", "ours"} <= set(found):
        done = statistics.median(one["forward"] + one["backward"] for one in found["ours"])
        floor = statistics.median(one["whole"] for one in found["floor"])
        print(f"{size:11} the encoder's product is {floor / done:.2f} of our forward and backward", flush=True)


def main() -> None:
    """Run, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--macro-steps", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/step.csv"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    if given.arm:
        size = given.sizes[0]
        arm = ARMS[given.arm](size) if given.runs else None
        for _ in range(given.runs):
            arm.step(torch.randn(SIZES[size][2], SIZES[size][0]))
        print(json.dumps({"mib": peak_mib()}))
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{described()}, fp32: medians of {given.runs} alternating steps, joint ones of {given.macro_steps} macro-steps")
    with given.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["size", "arm", "whole", "forward", "backward", "rest", "of_ours", "least", "most", "peak_mib"])
        for size in given.sizes:
            found = run(size, given.runs, given.macro_steps, given.arms)
            peaks = {} if given.no_memory else {name: alone(name, size) for name in given.arms if name != "floor"}
            report(size, found, peaks, table)
            seconds = [statistics.median(one["whole"] for one in times) for times in found.values()]
            picture = given.out.with_name(f"{given.out.stem}-{size}.svg")
            draw(picture, f"a step, {size}: {described()}", list(found), seconds, "seconds")


if __name__ == "__main__":
    main()

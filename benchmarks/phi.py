"""Time and memory of exact phi over all pairs of latents, beside what producing the activations costs.

    python benchmarks/phi.py                                     # 1,048,576 tokens, 20,480 latents and 65,536, k 64
    python benchmarks/phi.py --tokens 131072 --widths 20480

Firings are random, at rates that fall off as a dictionary's do. The language model's floor is its arithmetic: GPT-2 large up to layer 20 is
0.79 GFLOP a token (20 layers of 12 x 1280^2 parameters), at the speed of this machine's float32 matrix product.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from machine import described, peak_mib

from metasae_lightning.metrics import Phi, PhiSample
from metasae_lightning.step import Codes

BATCH, K, FLOP = 4096, 64, 20 * 12 * 1280**2 * 2


def codes(width: int, generator: torch.Generator) -> Codes:
    """A batch in which each token fires about k latents, common ones more often."""
    latents = (width * torch.rand(BATCH, K, generator=generator).square()).long()
    latents = latents.sort(-1).values
    fresh = torch.ones_like(latents, dtype=torch.bool)
    fresh[:, 1:] = latents[:, 1:] != latents[:, :-1]
    rows, at = fresh.nonzero(as_tuple=True)
    return Codes(rows, latents[rows, at], torch.ones(len(rows)), (BATCH, width))


def measure(width: int, tokens: int, memory_gib: float) -> dict[str, float]:
    """Seconds and peak of one width."""
    generator = torch.Generator().manual_seed(0)
    exact, sample = Phi(width, memory_gib=memory_gib, compute_with_cache=False), PhiSample(width)
    spent = {"update": 0.0, "sample": 0.0}
    for _ in range(tokens // BATCH):
        batch = codes(width, generator)
        for name, metric in (("update", exact), ("sample", sample)):
            began = time.perf_counter()
            metric.update(batch)
            spent[name] += time.perf_counter() - began
    print(exact.plan(), file=sys.stderr, flush=True)
    began = time.perf_counter()
    figures = {name: value.item() for name, value in exact.compute().items()}
    spent["compute"] = time.perf_counter() - began
    estimate = sample.compute()
    near = abs(estimate["mean_abs"].item() - figures["mean_abs"]) / (estimate["standard_error"].item() or 1)
    return {**spent, "peak_gib": peak_mib() / 1024, "sample_off_by_errors": near, **figures}


def product() -> float:
    """FLOP a second of this machine's float32 matrix product."""
    a, b = torch.randn(4096, 1280), torch.randn(1280, 5120)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = max(best, 2 * a.shape[0] * b.shape[0] * b.shape[1] / (time.perf_counter() - began))
    return best


def main() -> None:
    """Run each width in a process of its own and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--widths", type=int, nargs="+", default=[20_480, 65_536])
    parser.add_argument("--memory_gib", type=float, default=2.0)
    parser.add_argument("--alone", type=int)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measure(given.alone, given.tokens, given.memory_gib)))
        return
    speed = product()
    print(f"{described()}, {speed / 1e9:.0f} GFLOP/s")
    print(f"the activations of {given.tokens:,} tokens of GPT-2 large take {given.tokens * FLOP / speed:,.0f} s or more here")
    for width in given.widths:
        command = [sys.executable, __file__, "--alone", str(width), "--tokens", str(given.tokens), "--memory_gib", str(given.memory_gib)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.strip().split("\n")[-1])
        print(f"{width:,} latents: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)


if __name__ == "__main__":
    main()

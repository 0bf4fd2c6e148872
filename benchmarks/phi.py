"""Time and memory of exact phi over all pairs of latents, and the time that the language model needs for as many tokens.

    python benchmarks/phi.py                                     # 1,048,576 tokens, 20,480 latents and 65,536, k 64
    python benchmarks/phi.py --tokens 131072 --widths 20480

Firings are random, with rates as unequal as those of an SAE's latents. The time of the language model is a lower bound from its arithmetic:
0.79 GFLOP a token for GPT-2 large up to layer 20 (20 layers of 12 x 1280^2 parameters), at the speed of this machine's float32 matrix
product.
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from machine import machine_description, peak_mib

from metasae_lightning.metrics import Phi, PhiSample
from metasae_lightning.step import Codes

BATCH, K, FLOP = 4096, 64, 20 * 12 * 1280**2 * 2


def codes(width: int, generator: torch.Generator) -> Codes:
    """A batch with about k active latents on each token; latents with a small index are active more often."""
    latents = (width * torch.rand(BATCH, K, generator=generator).square()).long()
    latents = latents.sort(-1).values
    is_first = torch.ones_like(latents, dtype=torch.bool)
    is_first[:, 1:] = latents[:, 1:] != latents[:, :-1]
    rows, columns = is_first.nonzero(as_tuple=True)
    return Codes(rows, latents[rows, columns], torch.ones(len(rows)), (BATCH, width))


def measure(width: int, tokens: int, memory_gib: float) -> dict[str, float]:
    """Seconds, peak memory and results for one width."""
    generator = torch.Generator().manual_seed(0)
    exact, sample = Phi(width, memory_gib=memory_gib, compute_with_cache=False), PhiSample(width)
    seconds = {"update": 0.0, "sample": 0.0}
    for _ in range(tokens // BATCH):
        batch = codes(width, generator)
        for name, metric in (("update", exact), ("sample", sample)):
            start = time.perf_counter()
            metric.update(batch)
            seconds[name] += time.perf_counter() - start
    print(exact.plan(), file=sys.stderr, flush=True)
    start = time.perf_counter()
    figures = {name: value.item() for name, value in exact.compute().items()}
    seconds["compute"] = time.perf_counter() - start
    estimate = sample.compute()
    standard_errors = abs(estimate["mean_abs"].item() - figures["mean_abs"]) / (estimate["standard_error"].item() or 1)
    return {**seconds, "peak_gib": peak_mib() / 1024, "sample_off_by_errors": standard_errors, **figures}


def matmul_flops() -> float:
    """FLOP per second of this machine's float32 matrix product."""
    a, b = torch.randn(4096, 1280), torch.randn(1280, 5120)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        best = max(best, 2 * a.shape[0] * b.shape[0] * b.shape[1] / (time.perf_counter() - start))
    return best


def main() -> None:
    """Run each width in its own process and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--widths", type=int, nargs="+", default=[20_480, 65_536])
    parser.add_argument("--memory_gib", type=float, default=2.0)
    parser.add_argument("--alone", type=int)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.alone, args.tokens, args.memory_gib)))
        return
    speed = matmul_flops()
    print(f"{machine_description()}, {speed / 1e9:.0f} GFLOP/s")
    print(f"the activations of {args.tokens:,} tokens of GPT-2 large take at least {args.tokens * FLOP / speed:,.0f} s on this machine")
    for width in args.widths:
        command = [sys.executable, __file__, "--alone", str(width), "--tokens", str(args.tokens), "--memory_gib", str(args.memory_gib)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results = json.loads(process.stdout.strip().split("\n")[-1])
        print(f"{width:,} latents: " + ", ".join(f"{name} {value:.4g}" for name, value in results.items()), flush=True)


if __name__ == "__main__":
    main()

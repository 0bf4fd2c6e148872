"""`critic.Decomposition` beside SAEBench's `meta_structure`: the share of the same decoders' variance that the critics of each explain.

    python -m venv saebench && saebench/bin/pip install sae-bench==0.6.0 "datasets<4"   # SAEBench, in an environment of its own
    python benchmarks/meta_structure.py --saebench saebench/bin/python                   # planted rows and random ones
    python benchmarks/meta_structure.py --saebench saebench/bin/python --sae runs/quickstart-.../saes/primary --rows 1152

SAEBench's part runs in its environment, as a subprocess, and ours in this one. A critic takes about a minute of a CPU core, and four
on 4,608 rows of 576. Planted rows are sums of 2 of 256 random directions. SAEBench takes rows as they are, and this project their
directions: compare on unit rows. SAEBench trains under bfloat16 autocast unless told otherwise; here only with `--autocast`, which slows
a CPU without bfloat16 tenfold. "spread" is the standard deviation over seeds, "CPU s" a critic's mean; the last line is the difference of
the means.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import described
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

ROWS, WIDTH, DIRECTIONS = 2048, 128, 256


def generated() -> dict[str, Tensor]:
    """Rows that two directions each explain, and rows that nothing does but chance."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(DIRECTIONS, WIDTH, generator=generator))
    pairs = torch.rand(ROWS, DIRECTIONS, generator=generator).argsort(1)[:, :2]
    return {"planted": normalize(directions[pairs].sum(1)), "random": normalize(torch.randn(ROWS, WIDTH, generator=generator))}


def saelens(folder: Path, rows: int | None) -> dict[str, Tensor]:
    """The first rows of an SAE's decoder."""
    from sae_lens import SAE

    return {folder.name: SAE.load_from_disk(folder).W_dec.detach()[:rows].clone()}


def ours(W_dec: Tensor, seeds: int, steps: int) -> Iterator[tuple[float, float]]:
    """FVE and CPU seconds of each critic."""
    from metasae_lightning.functional import unit_rows
    from metasae_lightning.metrics import Decomposition

    metric = Decomposition(steps=steps)
    for seed in range(seeds):
        began = time.process_time()
        yield metric.variance_explained(unit_rows(W_dec), seed), time.process_time() - began


def theirs(W_dec: Tensor, seeds: int, steps: int, autocast: bool) -> Iterator[tuple[float, float]]:
    """The same of SAEBench's, in its environment; it reads nothing of an SAE but the decoder, and seeds torch alone."""
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.meta_structure.main import run_eval_single_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=W_dec.shape[1], d_sae=len(W_dec)))
    sae.W_dec.data = W_dec
    for seed in range(seeds):
        torch.manual_seed(seed)
        began = time.process_time()
        config = MetaStructureEvalConfig(random_seed=seed, train_steps=steps, autocast=autocast)
        found = run_eval_single_sae("", "", sae, config, "cpu").eval_result_metrics.meta_structure
        yield found.decoder_fraction_variance_explained, time.process_time() - began


def asked(python: str, W_dec: Tensor, given: argparse.Namespace) -> list[tuple[float, float]]:
    """What `theirs` says in that environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/rows.safetensors"
        save_file({"W_dec": W_dec.contiguous()}, file)
        command = [python, __file__, "--alone", file, "--seeds", str(given.seeds), "--steps", str(given.steps)]
        done = subprocess.run(command + ["--autocast"] * given.autocast, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().split("\n")[-1])


def line(name: str, found: list[tuple[float, float]]) -> Tensor:
    """Print one critic's figures; their mean and its squared error."""
    fve = torch.tensor([value for value, _ in found], dtype=torch.float64)
    spread, seconds = fve.std(correction=int(len(fve) > 1)), sum(seconds for _, seconds in found) / len(found)
    figures = "".join(f"{value:9.4f}" for value in [*fve.tolist(), fve.mean().item(), spread.item()])
    print(f"  {name:10}{figures}{seconds:9.0f}", flush=True)
    return torch.stack([fve.mean(), spread.square() / len(fve)])


def main() -> None:
    """Run both on each decoder and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saebench", help="the interpreter of SAEBench's environment", metavar="PYTHON")
    parser.add_argument("--sae", type=Path, help="a SAELens folder, instead of generated rows", metavar="FOLDER")
    parser.add_argument("--rows", type=int, help="so many of its rows, the first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(list(theirs(load_file(given.alone)["W_dec"], given.seeds, given.steps, given.autocast))))
        return
    if not given.saebench:
        parser.error("--saebench is needed: the interpreter of SAEBench's environment")
    print(described())
    for name, W_dec in (saelens(given.sae, given.rows) if given.sae else generated()).items():
        seeds = "".join(f"{f'seed {seed}':>9}" for seed in range(given.seeds))
        print(f"{name}, {len(W_dec):,} rows of {W_dec.shape[1]}\n  {'FVE':10}{seeds}{'mean':>9}{'spread':>9}{'CPU s':>9}")
        a = line("SAEBench", asked(given.saebench, W_dec, given))
        b = line("ours", list(ours(W_dec, given.seeds, given.steps)))
        print(f"  ours less SAEBench's {b[0] - a[0]:+.4f}, standard error {(a[1] + b[1]).sqrt():.4f}", flush=True)


if __name__ == "__main__":
    main()

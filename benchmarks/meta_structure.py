"""`metrics.Decomposition` against SAEBench's `meta_structure`: the fraction of variance that each explains of the same decoders.

    python -m venv saebench && saebench/bin/pip install sae-bench==0.6.0 "datasets<4"   # SAEBench, in an environment of its own
    python benchmarks/meta_structure.py --saebench saebench/bin/python                   # planted rows and random ones
    python benchmarks/meta_structure.py --saebench saebench/bin/python --sae runs/quickstart-.../saes/primary --rows 1152

SAEBench runs in its own environment, as a subprocess, and this project's metric in this environment. Training a critic takes about a
minute of a CPU core, and four minutes on 4,608 rows of 576. Planted rows are sums of 2 of 256 random directions. SAEBench uses the rows as
they are and this project uses their directions, so the comparison is on unit rows. SAEBench trains under bfloat16 autocast by default; here
only with `--autocast`, because it slows a CPU without bfloat16 tenfold. "spread" is the standard deviation over seeds, "CPU s" the mean
time of a critic; the last line is the difference of the means.
"""

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import machine_description
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

ROWS, WIDTH, DIRECTIONS = 2048, 128, 256


def generated_decoders() -> dict[str, Tensor]:
    """A decoder whose rows are sums of two directions each, and one of independent random rows."""
    generator = torch.Generator().manual_seed(0)
    directions = normalize(torch.randn(DIRECTIONS, WIDTH, generator=generator))
    pairs = torch.rand(ROWS, DIRECTIONS, generator=generator).argsort(1)[:, :2]
    return {"planted": normalize(directions[pairs].sum(1)), "random": normalize(torch.randn(ROWS, WIDTH, generator=generator))}


def sae_decoder(folder: Path, rows: int | None) -> dict[str, Tensor]:
    """The first rows of the decoder of an SAE."""
    from sae_lens import SAE

    return {folder.name: SAE.load_from_disk(folder).W_dec.detach()[:rows].clone()}


def ours(W_dec: Tensor, seeds: int, steps: int) -> Iterator[tuple[float, float]]:
    """Fraction of variance explained (FVE) and CPU seconds of this project's critic, for each seed."""
    from metasae_lightning.functional import unit_rows
    from metasae_lightning.metrics import Decomposition

    metric = Decomposition(steps=steps)
    for seed in range(seeds):
        start = time.process_time()
        yield metric.variance_explained(unit_rows(W_dec), seed), time.process_time() - start


def theirs(W_dec: Tensor, seeds: int, steps: int, autocast: bool) -> Iterator[tuple[float, float]]:
    """FVE and CPU seconds of SAEBench's critic, for each seed; runs in SAEBench's environment.

    SAEBench reads only the decoder of an SAE, and seeds only torch.
    """
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.meta_structure.main import run_eval_single_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=W_dec.shape[1], d_sae=len(W_dec)))
    sae.W_dec.data = W_dec
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = time.process_time()
        config = MetaStructureEvalConfig(random_seed=seed, train_steps=steps, autocast=autocast)
        result = run_eval_single_sae("", "", sae, config, "cpu").eval_result_metrics.meta_structure
        yield result.decoder_fraction_variance_explained, time.process_time() - start


def run_saebench(python: str, W_dec: Tensor, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Run `theirs` in SAEBench's environment."""
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/rows.safetensors"
        save_file({"W_dec": W_dec.contiguous()}, file)
        command = [python, __file__, "--alone", file, "--seeds", str(args.seeds), "--steps", str(args.steps)]
        process = subprocess.run(command + ["--autocast"] * args.autocast, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.strip().split("\n")[-1])


def print_line(name: str, results: list[tuple[float, float]]) -> Tensor:
    """Print the figures of one critic, and return the mean FVE and its squared standard error."""
    fve = torch.tensor([value for value, _ in results], dtype=torch.float64)
    spread, seconds = fve.std(correction=int(len(fve) > 1)), sum(seconds for _, seconds in results) / len(results)
    figures = "".join(f"{value:9.4f}" for value in [*fve.tolist(), fve.mean().item(), spread.item()])
    print(f"  {name:10}{figures}{seconds:9.0f}", flush=True)
    return torch.stack([fve.mean(), spread.square() / len(fve)])


def main() -> None:
    """Run both critics on each decoder and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saebench", help="the interpreter of SAEBench's environment", metavar="PYTHON")
    parser.add_argument("--sae", type=Path, help="a SAELens folder, instead of generated rows", metavar="FOLDER")
    parser.add_argument("--rows", type=int, help="use only this many rows, the first ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(list(theirs(load_file(args.alone)["W_dec"], args.seeds, args.steps, args.autocast))))
        return
    if not args.saebench:
        parser.error("--saebench is needed: the interpreter of SAEBench's environment")
    print(machine_description())
    for name, W_dec in (sae_decoder(args.sae, args.rows) if args.sae else generated_decoders()).items():
        seeds = "".join(f"{f'seed {seed}':>9}" for seed in range(args.seeds))
        print(f"{name}, {len(W_dec):,} rows of {W_dec.shape[1]}\n  {'FVE':10}{seeds}{'mean':>9}{'spread':>9}{'CPU s':>9}")
        a = print_line("SAEBench", run_saebench(args.saebench, W_dec, args))
        b = print_line("ours", list(ours(W_dec, args.seeds, args.steps)))
        print(f"  ours less SAEBench's {b[0] - a[0]:+.4f}, standard error {(a[1] + b[1]).sqrt():.4f}", flush=True)


if __name__ == "__main__":
    main()

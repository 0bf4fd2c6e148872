"""Speed and communication by number of ranks: joint steps of one global batch, where each rank is a process with one thread.

    python benchmarks/ranks.py                  # 1 and 2 ranks, the laptop's size
    python benchmarks/ranks.py --ranks 1 2 4
    python benchmarks/ranks.py --strategy sharded  # latents sharded among ranks, instead of all latents on every rank

More ranks than cores cannot be faster. On two cores the benchmark shows how well two ranks divide the work, and how many bytes they
exchange.
"""

import argparse
import csv
import multiprocessing
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine_description
from sae_lens import BatchTopKTrainingSAEConfig
from step import MACRO, META, SIZES
from torch.distributed.device_mesh import init_device_mesh

from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from metasae_lightning.training.optimizers import adam


def run_rank(rank: int, count: int, size: str, steps: int, cut: Any, strategy: str, folder: str) -> None:
    """Train on one rank, and save the seconds of each step and the bytes that the rank sent in all steps."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    d_in, d_sae, tokens, k, d_meta, meta_k = SIZES[size]
    shared: Any = {"d_in": d_in, "decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False}
    primary = BatchTopKTrainingSAEConfig(d_sae=d_sae, k=k, **shared)
    meta = BatchTopKTrainingSAEConfig(d_sae=d_meta, k=meta_k, **shared)
    module = JointSAE(primary, meta, {"d": Decomposability(0.3)}, n_p=MACRO, n_m=META, b_dec_init="mean", batch_cut=cut)
    ranks = replace(ProcessGroup.default(), bytes_sent=[])
    mesh = init_device_mesh("cpu", (1, count), mesh_dim_names=("data_parallel", "tensor_parallel")) if strategy == "sharded" else None
    module.join(ranks, mesh)
    assert module.meta is not None and ranks.bytes_sent is not None
    optimizers = adam(module.primary.parameters()), adam(module.meta.parameters())
    generator, seconds = torch.Generator().manual_seed(0), list[float]()
    for step in range(-MACRO, steps):
        x = torch.randn(tokens, d_in, generator=generator)[ranks.even_slice(tokens)]
        torch.distributed.barrier()
        start = time.perf_counter()
        module.step(Batch(x), *optimizers)
        if step >= 0:
            seconds.append(time.perf_counter() - start)
        else:
            ranks.bytes_sent.clear()
    torch.save({"seconds": seconds, "bytes": sum(ranks.bytes_sent)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Run the benchmark, print the results and write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--steps", type=int, default=2 * MACRO)
    parser.add_argument("--cut", choices=["global", "local"], default="global")
    parser.add_argument("--strategy", choices=["ddp", "sharded"], default="ddp")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ranks.csv"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{machine_description()}, one thread per rank, fp32, gloo, {args.strategy}: {args.steps} joint steps of "
        f"{SIZES[args.size][2]:,} tokens, {args.size}"
    )
    context = multiprocessing.get_context("spawn")
    with args.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ranks", "seconds", "of_one", "bytes_a_step"])
        first_seconds = None
        for count in args.ranks:
            with tempfile.TemporaryDirectory() as folder:
                processes = [
                    context.Process(target=run_rank, args=(rank, count, args.size, args.steps, args.cut, args.strategy, folder))
                    for rank in range(count)
                ]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                results = [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]
            # Means over macro-steps, because meta steps follow every tenth step.
            means = [statistics.mean(results[0]["seconds"][start : start + MACRO]) for start in range(0, args.steps, MACRO)]
            seconds, bytes_sent = statistics.median(means), max(result["bytes"] for result in results) / args.steps
            first_seconds = first_seconds or seconds
            table.writerow([count, round(seconds, 4), round(seconds / first_seconds, 3), round(bytes_sent)])
            relative = f"{seconds / first_seconds:.2f} of the first row's time"
            print(f"{count} ranks: {seconds:.3f} s a step, {relative}; {bytes_sent / 1e6:.2f} MB sent per rank and step")


if __name__ == "__main__":
    main()

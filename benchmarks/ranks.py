"""Ranks against speed, and what they tell each other: joint steps of one global batch, each rank a process with one thread.

    python benchmarks/ranks.py                  # 1 and 2 ranks, the laptop's size
    python benchmarks/ranks.py --ranks 1 2 4
    python benchmarks/ranks.py --strategy sharded  # latents divided, in place of all of them on every rank

More ranks than cores cannot be faster: of two cores this shows that two ranks divide the work, and how many bytes that takes.
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
from machine import described
from sae_lens import BatchTopKTrainingSAEConfig
from step import MACRO, META, SIZES
from torch.distributed.device_mesh import init_device_mesh

from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from metasae_lightning.training.joint import adam


def run(rank: int, count: int, size: str, steps: int, cut: Any, strategy: str, folder: str) -> None:
    """Seconds of each step on this rank, and the bytes that it gave away in all of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    d_in, d_sae, tokens, k, m, meta_k = SIZES[size]
    plain: Any = {"d_in": d_in, "decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False}
    primary = BatchTopKTrainingSAEConfig(d_sae=d_sae, k=k, **plain)
    meta = BatchTopKTrainingSAEConfig(d_sae=m, k=meta_k, **plain)
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
        began = time.perf_counter()
        module.step(Batch(x), *optimizers)
        if step >= 0:
            seconds.append(time.perf_counter() - began)
        else:
            ranks.bytes_sent.clear()
    torch.save({"seconds": seconds, "bytes": sum(ranks.bytes_sent)}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def main() -> None:
    """Run, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", choices=SIZES, default="laptop")
    parser.add_argument("--steps", type=int, default=2 * MACRO)
    parser.add_argument("--cut", choices=["global", "local"], default="global")
    parser.add_argument("--strategy", choices=["ddp", "sharded"], default="ddp")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/ranks.csv"))
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(
        f"{described()}, of which each rank has one, fp32, gloo, {given.strategy}: {given.steps} joint steps of "
        f"{SIZES[given.size][2]:,} tokens, {given.size}"
    )
    context = multiprocessing.get_context("spawn")
    with given.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["ranks", "seconds", "of_one", "bytes_a_step"])
        first = None
        for count in given.ranks:
            with tempfile.TemporaryDirectory() as folder:
                make = [
                    context.Process(target=run, args=(rank, count, given.size, given.steps, given.cut, given.strategy, folder))
                    for rank in range(count)
                ]
                for process in make:
                    process.start()
                for process in make:
                    process.join()
                found = [torch.load(f"{folder}/{rank}.pt") for rank in range(count)]
            # A macro-step's mean: meta steps come after every tenth.
            means = [statistics.mean(found[0]["seconds"][at : at + MACRO]) for at in range(0, given.steps, MACRO)]
            seconds, sent = statistics.median(means), max(one["bytes"] for one in found) / given.steps
            first = first or seconds
            table.writerow([count, round(seconds, 4), round(seconds / first, 3), round(sent)])
            print(
                f"{count} ranks: {seconds:.3f} s a step, {seconds / first:.2f} of the first; {sent / 1e6:.2f} MB into sums a rank and step"
            )


if __name__ == "__main__":
    main()

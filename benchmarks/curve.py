"""On real activations: that the fast path trains what SAELens's forward pass trains, and what the critic's approximations cost.

    python benchmarks/curve.py                   # 500 joint steps of 512 tokens at the quickstart's widths and the paper's learning rate
    python benchmarks/curve.py --steps 100 --lr 2e-3

Three modules begin from one seed and see the same batches. Two differ in `kernels` alone; the third is the dense one with each encoder
weight moved to the next number that float32 has, which tells how far apart runs come by rounding. Every tenth step the gradient of the
penalty is also made by each way of INEXACT and compared with the exact one.
"""

import argparse
import csv
import statistics
import warnings
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import described
from sae_lens import BatchTopKTrainingSAEConfig

from metasae_lightning.corpora import PythonDocs
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.functional import unit_rows
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE

MACRO = 10
INEXACT: dict[str, dict[str, Any]] = {
    "supports of the macro-step": {"again": True},
    "an eighth of the rows": {"rows": 1 / 8},
    "a sixteenth of the rows": {"rows": 1 / 16},
}


def module(kernels: Any) -> JointSAE:
    """The quickstart's joint SAE at one learning rate."""
    same: Any = {"d_in": 576, "normalize_activations": "layer_norm", "decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False}
    primary = BatchTopKTrainingSAEConfig(d_sae=4608, k=32, **same)
    return JointSAE(primary, BatchTopKTrainingSAEConfig(d_sae=405, k=8, **same), {"p": Decomposability(0.3)}, kernels=kernels)


def penalty_gradient(joint: JointSAE, step: int, *, rows: float = 1.0, again: bool = False) -> torch.Tensor:
    """Of the penalty as it is now, by one of the ways to make it."""
    W_dec = joint.primary.W_dec.detach().clone().requires_grad_()
    assert joint.meta is not None
    Decomposability(0.3, rows=rows)(W_dec, partial(joint.meta.reconstruct, reuse_support=again), step).backward()
    assert W_dec.grad is not None
    return W_dec.grad


def main() -> None:
    """Run, print and keep the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/curve.csv"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.15.hook_resid_post", device="cpu")
    model.load()
    batching = Batching(batch_size=given.batch, context_size=128, buffer_size=8192, skip_positions=2, max_norm_ratio=10)
    stream = iter(ActivationStream(PythonDocs(), model, batching, StreamSlice("train", 10**9)))
    modules = {"sparse": module("sparse"), "dense": module("dense"), "moved": module("dense")}
    with torch.no_grad():
        encoder = modules["moved"].primary.sae.W_enc
        encoder.copy_(encoder.nextafter(torch.ones(())))
    optimizers = {}
    for kernels, joint in modules.items():
        assert joint.meta is not None
        optimizers[kernels] = [
            torch.optim.Adam(sae.parameters(), lr=given.lr, betas=(0.9, 0.99), fused=True) for sae in (joint.primary, joint.meta)
        ]
    fast, errors = modules["sparse"], dict[str, list[float]]()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{described()}, fp32, seed 0: {given.steps} steps of {given.batch} tokens of SmolLM2-135M, layer 15, lr {given.lr:g}")
    with given.out.open("w", newline="") as file:
        table, apart = csv.writer(file), dict[str, list[float]](sparse=[], moved=[])
        table.writerow(["step", *modules])
        for step, activations in enumerate(islice(stream, given.steps)):
            batch = Batch.of(activations)
            losses = {kernels: joint.step(batch, *optimizers[kernels]).loss.item() for kernels, joint in modules.items()}
            table.writerow([step, *losses.values()])
            for name, found in apart.items():
                found.append(losses[name] / losses["dense"] - 1)
            if step % MACRO == 0:  # the first step after a meta phase: what the approximation would hold
                fast.meta.reconstruct(unit_rows(fast.primary.W_dec.detach()), reuse_support=True)  # type: ignore[union-attr]
            if step % MACRO == MACRO - 2:
                exact = penalty_gradient(fast, step)
                for name, how in INEXACT.items():
                    off = (penalty_gradient(fast, step, **how) - exact).norm() / exact.norm()
                    errors.setdefault(name, []).append(off.item())
            if step % 50 == 49:
                searches = fast.meta._forward_pass.incremental_topk.searches  # type: ignore[union-attr]
                far = ", ".join(f"{name} {max(map(abs, found)):.1e}" for name, found in apart.items())
                print(f"step {step + 1}: loss {losses['sparse']:.4f}, from dense at most: {far}; {searches} searches", flush=True)
    stream.close()
    for name, found in apart.items():
        means = [abs(statistics.mean(found[start : start + 50])) for start in range(0, len(found), 50)]
        beyond = sum(abs(each) > 1e-3 for each in found) / len(found)
        told = f"at most {max(map(abs, found)):.2e} of the loss at a step, more than 1e-3 at {beyond:.1%} of them"
        print(f"{name} from dense: {told}; the mean over 50 steps at most {max(means):.1e}")
    for name, found in errors.items():
        print(f"relative error of the penalty's gradient, {name}: median {statistics.median(found):.4f}, largest {max(found):.4f}")


if __name__ == "__main__":
    main()

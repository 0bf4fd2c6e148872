"""On real activations: the loss of the sparse kernels against SAELens's dense ones, and the error of the critic's approximations.

    python benchmarks/curve.py                   # 500 joint steps of 512 tokens at the quickstart's widths and the paper's learning rate
    python benchmarks/curve.py --steps 100 --lr 2e-3

Three modules start from one seed and get the same batches. The first two differ in `kernels` only. The third is the dense one with each
encoder weight moved to the next float32 number; its distance from the dense one shows the effect of rounding alone. Every tenth step the
gradient of the penalty is also computed by each approximation in APPROXIMATIONS and compared with the exact gradient.
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
from machine import machine_description
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
APPROXIMATIONS: dict[str, dict[str, Any]] = {
    "supports of the macro-step": {"reuse_support": True},
    "an eighth of the rows": {"rows": 1 / 8},
    "a sixteenth of the rows": {"rows": 1 / 16},
}


def joint_sae(kernels: Any) -> JointSAE:
    """A joint SAE of the quickstart's widths."""
    shared: Any = {"d_in": 576, "normalize_activations": "layer_norm", "decoder_init_norm": 1.0, "rescale_acts_by_decoder_norm": False}
    primary = BatchTopKTrainingSAEConfig(d_sae=4608, k=32, **shared)
    return JointSAE(primary, BatchTopKTrainingSAEConfig(d_sae=405, k=8, **shared), {"p": Decomposability(0.3)}, kernels=kernels)


def penalty_gradient(joint: JointSAE, step: int, *, rows: float = 1.0, reuse_support: bool = False) -> torch.Tensor:
    """The gradient of the penalty in the current decoder, exact or by one of the approximations."""
    W_dec = joint.primary.W_dec.detach().clone().requires_grad_()
    assert joint.meta is not None
    Decomposability(0.3, rows=rows)(W_dec, partial(joint.meta.reconstruct, reuse_support=reuse_support), step).backward()
    assert W_dec.grad is not None
    return W_dec.grad


def main() -> None:
    """Run the benchmark, print the results and write the losses to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/curve.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.15.hook_resid_post", device="cpu")
    model.load()
    batching = Batching(batch_size=args.batch, context_size=128, buffer_size=8192, skip_positions=2, max_norm_ratio=10)
    stream = iter(ActivationStream(PythonDocs(), model, batching, StreamSlice("train", 10**9)))
    modules = {"sparse": joint_sae("sparse"), "dense": joint_sae("dense"), "moved": joint_sae("dense")}
    with torch.no_grad():
        encoder = modules["moved"].primary.sae.W_enc
        encoder.copy_(encoder.nextafter(torch.ones(())))
    optimizers = {}
    for kernels, joint in modules.items():
        assert joint.meta is not None
        optimizers[kernels] = [
            torch.optim.Adam(sae.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True) for sae in (joint.primary, joint.meta)
        ]
    fast, errors = modules["sparse"], dict[str, list[float]]()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine_description()}, fp32, seed 0: {args.steps} steps of {args.batch} tokens of SmolLM2-135M, layer 15, lr {args.lr:g}")
    with args.out.open("w", newline="") as file:
        table, differences = csv.writer(file), dict[str, list[float]](sparse=[], moved=[])
        table.writerow(["step", *modules])
        for step, activations in enumerate(islice(stream, args.steps)):
            batch = Batch.of(activations)
            losses = {kernels: joint.step(batch, *optimizers[kernels]).loss.item() for kernels, joint in modules.items()}
            table.writerow([step, *losses.values()])
            for name, relative in differences.items():
                relative.append(losses[name] / losses["dense"] - 1)
            if step % MACRO == 0:  # the first step after a meta phase, whose supports the approximation reuses
                fast.meta.reconstruct(unit_rows(fast.primary.W_dec.detach()), reuse_support=True)  # type: ignore[union-attr]
            if step % MACRO == MACRO - 2:
                exact = penalty_gradient(fast, step)
                for name, options in APPROXIMATIONS.items():
                    error = (penalty_gradient(fast, step, **options) - exact).norm() / exact.norm()
                    errors.setdefault(name, []).append(error.item())
            if step % 50 == 49:
                searches = fast.meta.forward_pass.incremental_topk.searches  # type: ignore[union-attr]
                maxima = ", ".join(f"{name} {max(map(abs, relative)):.1e}" for name, relative in differences.items())
                print(
                    f"step {step + 1}: loss {losses['sparse']:.4f}, largest difference from dense: {maxima}; {searches} searches",
                    flush=True,
                )
    stream.close()
    for name, relative in differences.items():
        means = [abs(statistics.mean(relative[start : start + 50])) for start in range(0, len(relative), 50)]
        large = sum(abs(difference) > 1e-3 for difference in relative) / len(relative)
        text = f"at most {max(map(abs, relative)):.2e} of the loss at a step, more than 1e-3 at {large:.1%} of the steps"
        print(f"{name} against dense: {text}; the mean over 50 steps at most {max(means):.1e}")
    for name, gradient_errors in errors.items():
        figures = f"median {statistics.median(gradient_errors):.4f}, largest {max(gradient_errors):.4f}"
        print(f"relative error of the penalty's gradient, {name}: {figures}")


if __name__ == "__main__":
    main()

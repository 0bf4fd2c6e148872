"""Time of a subspace SAE's training step: its sparse kernels, its dense forward pass, and a sparse TopK with equally many live values.

    python benchmarks/architectures.py            # seconds of the processor, ratios to the sparse kernels

Arms alternate in one process and one thread on the same random activations. Times are those of the processor, since a step's time on the
wall depends on what else the machine does.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from machine import machine_description
from sae_lens import TopKTrainingSAEConfig
from torch.optim import Adam

from metasae_lightning.architectures import SubspaceTrainingSAEConfig
from metasae_lightning.sae.learner import Learner, LearnerConfig

D_IN, D_SAE, GROUP, ACTIVE = 576, 4608, 6, 5


def learners() -> dict[str, Learner]:
    """The arms by name; each has `ACTIVE * GROUP` live values a token."""
    shared: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "decoder_init_norm": 1.0}
    groups: dict[str, Any] = {"group_size": GROUP, "k": ACTIVE, **shared}
    top_k = TopKTrainingSAEConfig(**shared, k=ACTIVE * GROUP, rescale_acts_by_decoder_norm=False)
    configs: dict[str, tuple[Any, Any]] = {
        "sparse": (SubspaceTrainingSAEConfig(**groups), "sparse"),
        "dense": (SubspaceTrainingSAEConfig(**groups), "dense"),
        "sparse, batch_top": (SubspaceTrainingSAEConfig(**groups, batch_top=True), "sparse"),
        "sparse, no nuclear norm, free encoder": (
            SubspaceTrainingSAEConfig(**groups, nuclear_coefficient=0.0, unit_encoder=False),
            "sparse",
        ),
        "TopK, sparse": (top_k, "sparse"),
        "TopK, dense": (top_k, "dense"),
    }
    return {name: Learner(cfg, LearnerConfig(10**9, kernels=kernels), role=name, seed=0) for name, (cfg, kernels) in configs.items()}


def main() -> None:
    """Print the median time of each arm's step and its ratio to the sparse kernels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms = {name: (learner, Adam(learner.parameters(), lr=1e-3, fused=True)) for name, learner in learners().items()}
    times: dict[str, list[float]] = {name: [] for name in arms}
    generator = torch.Generator().manual_seed(0)
    for run in range(-1, args.runs):
        x = torch.randn(args.tokens, D_IN, generator=generator)
        for name, (learner, optimizer) in arms.items():
            start = time.process_time()
            learner.learn(x, optimizer, backward=lambda loss: loss.backward())
            if run >= 0:  # the first step allocates memory and the optimiser's state
                times[name].append(time.process_time() - start)
    print(f"{machine_description()}: {args.tokens} tokens, d_in {D_IN}, {D_SAE // GROUP} groups of {GROUP}, {ACTIVE} active")
    for name, values in times.items():
        ratios = [value / sparse for value, sparse in zip(values, times["sparse"], strict=True)]
        print(f"{name:40} {statistics.median(values):.3f} s  {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

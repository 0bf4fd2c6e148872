"""Whether training on the device gives the weights that float64 gives on the CPU, for every architecture of the top-k family."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_arms import autocast
from gpu_results import Budget, Results, print_table
from torch import Tensor

# The largest relative difference of a weight in float64; the losses in bf16-mixed may differ by as much as its products.
FLOAT64, BF16 = 1e-9, 0.05
ARCHITECTURES = ("TopKTrainingSAEConfig", "BatchTopKTrainingSAEConfig", "MatryoshkaBatchTopKTrainingSAEConfig")


Check = Callable[[str, str, str, "Problem", Results], list[str]]
"""Checks one variant of an architecture and returns its line of a table."""


@dataclass(frozen=True)
class Problem:
    """Widths, rows and number of steps of a check."""

    d_in: int
    d_sae: int
    rows: int
    k: int
    steps: int


PROBLEM, TINY = Problem(64, 512, 256, 8, 6), Problem(16, 64, 32, 4, 2)
# Steps of a run by CUDA graph, of which the first are computed without it; and the variants that are run by graph.
GRAPH_STEPS = 32
GRAPH_VARIANTS = ("joint", "dead latents", "clipped")
# What each variant changes: the primary's config, the module, and its penalties.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "joint": ({}, {}, ("decomposability",)),
    "solo": ({}, {}, ()),
    "rescaled decoder": ({"rescale_acts_by_decoder_norm": True}, {"decoder_rows": "free"}, ("decomposability",)),
    "dead latents": ({"aux_loss_coefficient": 1 / 32}, {"dead_after_tokens": 1}, ("decomposability",)),
    "orthogonality": ({}, {}, ("orthogonality",)),
    "both penalties": ({}, {}, ("decomposability", "orthogonality")),
    "two micro-batches": ({}, {"micro_batches": 2}, ("decomposability",)),
    "clipped": ({}, {"clip_grad_norm": 0.1}, ("decomposability",)),
}


def module_of(architecture: str, variant: str, problem: Problem, *, cuda_graph: bool = True) -> Any:
    """A `JointSAE` on the CPU in float32; the same arguments give the same weights."""
    import sae_lens

    from metasae_lightning.penalties import Decomposability, Orthogonality
    from metasae_lightning.training import JointSAE

    of_primary, of_module, names = VARIANTS[variant]
    # With encoder rows equal to the decoder's, a latent that fires alone has a gradient of rounding errors, which Adam enlarges.
    shared: Any = {"d_in": problem.d_in, "decoder_init_norm": 0.7}
    widths = {"matryoshka_widths": [problem.d_sae // 4, problem.d_sae]} if "Matryoshka" in architecture else {}
    primary_args = {"d_sae": problem.d_sae, "k": problem.k, "rescale_acts_by_decoder_norm": False, **widths, **of_primary}
    meta = sae_lens.BatchTopKTrainingSAEConfig(d_sae=problem.d_sae // 8, k=2, rescale_acts_by_decoder_norm=False, **shared)
    every = {"decomposability": Decomposability(0.3), "orthogonality": Orthogonality(0.25, chunk_size=problem.d_sae // 2)}
    return JointSAE(
        getattr(sae_lens, architecture)(**shared, **primary_args),
        meta if "decomposability" in names else None,
        {name: every[name] for name in names},
        n_p=2,
        n_m=1,
        cuda_graph=cuda_graph,
        **{"b_dec_init": "mean", "dead_after_tokens": 10**9, **of_module},
    )


def activations(problem: Problem, step: int) -> Tensor:
    """Sparse mixtures of fixed directions, in float64 on the CPU; the same `step` gives the same rows."""
    generator = torch.Generator().manual_seed(step)
    directions = torch.randn(problem.d_in * 2, problem.d_in, generator=torch.Generator().manual_seed(999), dtype=torch.float64)
    weights = torch.rand(problem.rows, len(directions), generator=generator, dtype=torch.float64)
    noise = torch.randn(problem.rows, problem.d_in, generator=generator, dtype=torch.float64)
    return (weights * (weights < 0.1)) @ directions * 10 + 0.05 * noise + 0.5


@dataclass(frozen=True)
class Trained:
    """A module's weights after its steps, and the figures of the steps."""

    weights: dict[str, Tensor]
    losses: list[float]
    dead: float

    @classmethod
    def of(cls, module: Any, problem: Problem, device: torch.device, dtype: torch.dtype, *, bf16: bool = False) -> "Trained":
        """Train a module on the device."""
        from metasae_lightning.step import Batch
        from metasae_lightning.training.optimizers import adam

        module = module.to(device=device, dtype=dtype)
        optimizers = [adam(learner.parameters()) for learner in (module.primary, module.meta) if learner is not None]
        outputs: list[Any] = []
        for step in range(problem.steps):
            with autocast(device, enabled=bf16):
                outputs.append(module.step(Batch(activations(problem, step).to(device, dtype)), *optimizers))
        weights = {name: parameter.detach().cpu().double() for name, parameter in module.named_parameters()}
        return cls(weights, [float(output.loss) for output in outputs], max(float(output.primary.dead) for output in outputs))

    def difference(self, other: "Trained") -> tuple[float, str]:
        """The largest difference of a weight, divided by the largest weight of its tensor in `other`, and that tensor's name."""
        by_name = {
            name: float((self.weights[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-30))
            for name, weight in other.weights.items()
        }
        name = max(by_name, key=lambda key: by_name[key] if by_name[key] == by_name[key] else float("inf"))
        return by_name[name], name

    def loss_difference(self, other: "Trained") -> float:
        """The relative difference of the first step's loss, before weights differ."""
        return abs(self.losses[0] / other.losses[0] - 1)


def check(arm: str, architecture: str, variant: str, problem: Problem, results: Results) -> list[str]:
    """Train one variant in four ways, write its rows under the name `arm`, and return its line of the table."""
    device = results.device
    expected = Trained.of(module_of(architecture, variant, problem), problem, torch.device("cpu"), torch.float64)
    double = Trained.of(module_of(architecture, variant, problem), problem, device, torch.float64)
    single = Trained.of(module_of(architecture, variant, problem), problem, device, torch.float32)
    mixed = Trained.of(module_of(architecture, variant, problem), problem, device, torch.float32, bf16=True)
    faults: list[str] = []
    error, tensor = double.difference(expected)
    if not error <= FLOAT64:
        faults.append(f"{tensor} DIFFERS in float64")
    single_error, single_tensor = single.difference(expected)
    loss_error = mixed.loss_difference(expected)
    if not loss_error <= BF16:
        faults.append("the loss DIFFERS in bf16-mixed")
    if variant == "dead latents" and not expected.dead:
        faults.append("NO LATENT DIED, so nothing was checked")
    results.failed += len(faults)
    note = "; ".join(faults)
    results.add("checks", "", arm, "float64 against the CPU", error, "relative", note or tensor)
    results.add("checks", "", arm, "float32 against the CPU's float64", single_error, "relative", single_tensor)
    results.add("checks", "", arm, "first loss in bf16-mixed", loss_error, "relative")
    return [arm, f"{error:.1e}", f"{single_error:.1e}", single_tensor, f"{loss_error:.1e}", note or "ok"]


def check_graph(arm: str, architecture: str, variant: str, problem: Problem, results: Results) -> list[str]:
    """Train one variant in float32 with a CUDA graph and without, and compare the weights bit by bit."""
    problem = replace(problem, steps=GRAPH_STEPS)
    modules = [module_of(architecture, variant, problem, cuda_graph=on) for on in (True, False)]
    by_graph, without = (Trained.of(module, problem, results.device, torch.float32) for module in modules)
    error, tensor = by_graph.difference(without)
    replayed = [learner.step_graph.replayed for learner in (modules[0].primary, modules[0].meta)]
    note = f"{tensor} DIFFERS" if error else "" if min(replayed) else "NO STEP WAS REPLAYED" if results.device.type == "cuda" else "no GPU"
    results.failed += "DIFFERS" in note or "NO STEP" in note
    results.add("checks", "", arm, "with a CUDA graph against without", error, "relative", note)
    results.add("checks", "", arm, "replayed steps of the primary", replayed[0], f"of {GRAPH_STEPS}", note)
    return [arm, f"{error:.1e}", f"{replayed[0]} and {replayed[1]}", note or "ok"]


def check_all(function: Check, variants: Iterable[str], results: Results, budget: Budget, *, tiny: bool) -> list[list[str]]:
    """The lines of a table: a check of every variant with every architecture, or in the tiny form with one of them."""
    rows: list[list[str]] = []
    for index, variant in enumerate(variants):
        for architecture in ARCHITECTURES[index % 3 :][:1] if tiny else ARCHITECTURES:
            arm = f"{architecture.removesuffix('TrainingSAEConfig')}, {variant}"
            if budget.is_over("checks"):
                results.skip("checks", "", arm, budget.reason("checks"))
                continue
            with results.attempt("checks", "", arm):
                rows.append(function(arm, architecture, variant, TINY if tiny else PROBLEM, results))
    return rows


def run(results: Results, budget: Budget, *, tiny: bool) -> None:
    """Check every architecture and variant, and print the table; the tiny form checks each variant with one of the architectures."""
    rows = check_all(check, VARIANTS, results, budget, tiny=tiny)
    header = ["check", "float64", "float32", "by its tensor", "bf16 loss", "verdict"]
    print_table("largest relative difference of a weight from the CPU's in float64, after a few joint steps", header, rows)
    rows = check_all(check_graph, GRAPH_VARIANTS, results, budget, tiny=tiny)
    title = f"{GRAPH_STEPS} steps in float32 with a CUDA graph against steps without"
    print_table(title, ["check", "difference", "replayed: primary and meta", "verdict"], rows)

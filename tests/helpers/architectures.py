"""A small training config for every architecture of SAELens and some of ours, with activations and optimisers to train it."""

from collections.abc import Callable
from typing import Any

import torch
from sae_lens import (
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from torch import Tensor
from torch.optim import Adam, Optimizer

from metasae_lightning.architectures import AdaptiveElasticNetTrainingSAEConfig, PaperGatedTrainingSAEConfig
from metasae_lightning.training import JointSAE

ARCHITECTURES: dict[str, Callable[..., TrainingSAEConfig]] = {
    "standard": lambda **kw: StandardTrainingSAEConfig(**kw, l1_coefficient=0.1, l1_warm_up_steps=5),
    "gated": lambda **kw: GatedTrainingSAEConfig(**kw, l1_coefficient=0.1),
    "jumprelu": lambda **kw: JumpReLUTrainingSAEConfig(**kw, l0_coefficient=0.1, l0_warm_up_steps=5, pre_act_loss_coefficient=1e-3),
    "topk": lambda **kw: TopKTrainingSAEConfig(**kw, k=4),
    "batchtopk": lambda **kw: BatchTopKTrainingSAEConfig(**kw, k=4),
    "matryoshka_batchtopk": lambda **kw: MatryoshkaBatchTopKTrainingSAEConfig(**kw, k=4, matryoshka_widths=[8, kw["d_sae"]]),
    "abstopk": lambda **kw: AbsTopKTrainingSAEConfig(**kw, k=4),
    "matching_pursuit": lambda **kw: MatchingPursuitTrainingSAEConfig(**kw, max_iterations=4),
}
# Ours, whose configs are checked while testing against SAELens's annotations, which leave out constant_norm_rescale.
OURS: dict[str, Callable[..., TrainingSAEConfig]] = {
    "paper_gated": lambda **kw: PaperGatedTrainingSAEConfig(**kw, l1_coefficient=0.1),
    "adaptive_elastic_net": lambda **kw: AdaptiveElasticNetTrainingSAEConfig(
        **kw, l1_coefficient=0.1, l2_coefficient=0.05, weight_ramp_steps=5
    ),
}
D_IN = 16


def config(name: str, d_sae: int = 48, **kw: Any) -> TrainingSAEConfig:
    """A training config by the architecture's name, with changes."""
    return (ARCHITECTURES | OURS)[name](**{"d_in": D_IN, "d_sae": d_sae, "decoder_init_norm": 1.0, **kw})


def optimizers(module: JointSAE, lr: float = 1e-3) -> tuple[Optimizer, Optimizer | None]:
    """Adam for the primary, and for the meta SAE if there is one."""
    primary = Adam(module.primary.parameters(), lr=lr)
    return primary, None if module.meta is None else Adam(module.meta.parameters(), lr=lr)


def activations(step: int, rows: int = 64, d_in: int = D_IN) -> Tensor:
    """Rows that are sparse mixtures of 32 fixed directions; the same `step` gives the same rows."""
    directions = torch.nn.functional.normalize(torch.randn(32, d_in, generator=torch.Generator().manual_seed(999)), dim=-1)
    generator = torch.Generator().manual_seed(step)
    weights = torch.rand(rows, 32, generator=generator) * (torch.rand(rows, 32, generator=generator) < 0.1)
    return 3 * weights @ directions + 0.05 * torch.randn(rows, d_in, generator=generator) + 0.5


class Batches:
    """`count` batches of activations. A class, since Lightning takes a list to be a list of loaders."""

    def __init__(self, count: int, start: int = 0):
        self.numbers = range(start, start + count)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Any:
        return map(activations, self.numbers)

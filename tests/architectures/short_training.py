"""Training of a SAELens training SAE for a few hundred steps, without a learner."""

from collections.abc import Callable
from typing import Any

import torch
from sae_lens import TrainingSAEConfig
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from torch import Tensor

from metasae_lightning.sae import pretrained


def trained(
    cfg: TrainingSAEConfig,
    x: Tensor,
    *,
    steps: int = 300,
    lr: float = 1e-2,
    unit_rows: bool = True,
    start: Callable[[Any], None] | None = None,
) -> Any:
    """An SAE trained on batches of 128 of `x`, with a learning rate that falls to 0 in the second half; then without gradient.

    `start` changes the initial weights.
    """
    sae: Any = pretrained.build(cfg, role="primary", seed=1)
    if start is not None:
        start(sae)
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    named = sae.get_coefficients().items()
    coefficients = {name: value.value if isinstance(value, TrainCoefficientConfig) else value for name, value in named}
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        rows = x[(step * 128) % len(x) :][:128]
        optimizer.zero_grad()
        sae.training_forward_pass(TrainStepInput(rows, coefficients, None, step, False)).loss.backward()
        optimizer.step()
        if unit_rows:
            sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    return sae.requires_grad_(False)

"""The default optimiser."""

from collections.abc import Iterable
from typing import Any

from torch.optim import Adam, Optimizer


def adam(params: Iterable[Any]) -> Optimizer:
    """The author's optimiser: Adam at 3e-4 with betas (0.9, 0.99), no schedule."""
    return Adam(params, lr=3e-4, betas=(0.9, 0.99), fused=True)

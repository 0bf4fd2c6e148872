"""Torchmetric of firing rates and dead latents."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning.step import Codes


class DeadLatents(Metric):
    """How often latents fire: the share that is dead, and the densities of all.

    `dead` is the share that was silent over the last `window` tokens (over everything seen, without one), `below_1e-05` and
    `below_1e-06` the shares that fired on fewer tokens than that.

    >>> metric = DeadLatents(d_sae=4)
    >>> metric.update(Codes.from_dense(torch.tensor([[1.0, 0.0, 2.0, 0.0]])))
    >>> metric.compute()["dead"].item(), metric.density().tolist()
    (0.5, [1.0, 0.0, 1.0, 0.0])
    """

    full_state_update = False
    firings: Tensor
    silent_for: Tensor
    tokens: Tensor

    def __init__(self, d_sae: int, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window = window
        self.add_state("firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        # Ranks see tokens side by side: a latent is silent since the rank that heard it last, times their number.
        self.add_state("silent_for", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="min")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Codes) -> None:
        """Add a batch."""
        fired = codes.firings()
        self.firings += fired
        self.silent_for = torch.where(fired > 0, 0, self.silent_for + codes.shape[0])
        self.tokens += codes.shape[0]

    def density(self) -> Float[Tensor, " d_sae"]:
        """On what share of the tokens each latent fired."""
        return self.firings.double() / self.tokens

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        silent = self.firings == 0
        if self.window is not None:
            ranks = torch.distributed.get_world_size() if self._is_synced else 1
            silent = self.silent_for * ranks >= self.window
        shares = {f"below_{share:g}": (self.density() < share).double().mean() for share in (1e-5, 1e-6)}
        return {"dead": silent.double().mean(), **shares}

"""Torchmetric of firing rates and dead latents."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning.step import Codes


class DeadLatents(Metric):
    """Share of dead latents, and firing rate of each latent (tokens it fired on / all tokens). All values are shares from 0 to 1.

    `dead` is the share of latents that did not fire in the last `window` tokens (in all tokens, if `window` is None). `below_1e-05` and
    `below_1e-06` are the shares of latents with a lower firing rate than that.

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
        # Ranks process tokens in parallel, so the silent time is the smallest over ranks times the number of ranks.
        self.add_state("silent_for", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="min")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Codes) -> None:
        """Add a batch."""
        fired = codes.firings()
        self.firings += fired
        self.silent_for = torch.where(fired > 0, 0, self.silent_for + codes.shape[0])
        self.tokens += codes.shape[0]

    def density(self) -> Float[Tensor, " d_sae"]:
        """Firing rate of each latent: the share of tokens that it fired on."""
        return self.firings.double() / self.tokens

    def compute(self) -> dict[str, Tensor]:
        """The share of dead latents and of latents below each firing rate."""
        silent = self.firings == 0
        if self.window is not None:
            ranks = torch.distributed.get_world_size() if self._is_synced else 1
            silent = self.silent_for * ranks >= self.window
        shares = {f"below_{share:g}": (self.density() < share).double().mean() for share in (1e-5, 1e-6)}
        return {"dead": silent.double().mean(), **shares}

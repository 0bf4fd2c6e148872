"""Torchmetric of the decoder's geometry."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional


class DecoderGeometry(Metric):
    """Cosine of each decoder row with its nearest other row (mean and maximum), and Euclidean lengths of rows.

    With groups of rows it has also the mean and quantiles of their stable rank.

    >>> import torch
    >>> metric = DecoderGeometry()
    >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'nearest_mean': 0.733, 'nearest_max': 0.8, 'norm_mean': 2.667, 'norm_min': 1.0, 'norm_max': 5.0}
    """

    full_state_update = False
    nearest: list[Tensor]
    norms: list[Tensor]
    stable_ranks: list[Tensor]

    def __init__(self, *, group_size: int = 1, **kwargs: Any) -> None:
        # Every rank has the same decoder, so nothing is synchronised.
        super().__init__(**{"sync_on_compute": False, **kwargs})
        self.group_size = group_size
        for name in ("nearest", "norms", "stable_ranks"):
            self.add_state(name, [], dist_reduce_fx=None)

    def update(self, W_dec: Float[Tensor, "d_sae d_in"]) -> None:
        """Set the decoder; only the last one is used."""
        self.nearest = [functional.nearest_cosines(W_dec.detach().float())]
        self.norms = [W_dec.detach().float().norm(dim=-1)]
        self.stable_ranks = [functional.stable_ranks(W_dec.detach(), group_size=self.group_size)] if self.group_size > 1 else []

    def compute(self) -> dict[str, Tensor]:
        """Mean and maximum of nearest cosines; mean, minimum and maximum of lengths; mean and quantiles of groups' stable ranks."""
        nearest, norms = self.nearest[0].double(), self.norms[0].double()
        figures = {"nearest_mean": nearest.mean(), "nearest_max": nearest.max()}
        figures |= {"norm_mean": norms.mean(), "norm_min": norms.min(), "norm_max": norms.max()}
        for ranks in self.stable_ranks:
            quantiles = ranks.quantile(ranks.new_tensor([0.1, 0.5, 0.9]))
            figures |= {"stable_rank_mean": ranks.mean()}
            figures |= {f"stable_rank_{name}": value for name, value in zip(("q10", "median", "q90"), quantiles, strict=True)}
        return figures

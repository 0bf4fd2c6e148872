"""Torchmetric of the decoder's geometry."""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional


class DecoderGeometry(Metric):
    """Cosine of each decoder row with its nearest other row (mean and maximum), and Euclidean lengths of rows.

    >>> import torch
    >>> metric = DecoderGeometry()
    >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'nearest_mean': 0.733, 'nearest_max': 0.8, 'norm_mean': 2.667, 'norm_min': 1.0, 'norm_max': 5.0}
    """

    full_state_update = False
    nearest: list[Tensor]
    norms: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        # Every rank has the same decoder, so nothing is synchronised.
        super().__init__(**{"sync_on_compute": False, **kwargs})
        for name in ("nearest", "norms"):
            self.add_state(name, [], dist_reduce_fx=None)

    def update(self, W_dec: Float[Tensor, "d_sae d_in"]) -> None:
        """Set the decoder; only the last one is used."""
        self.nearest = [functional.nearest_cosines(W_dec.detach().float())]
        self.norms = [W_dec.detach().float().norm(dim=-1)]

    def compute(self) -> dict[str, Tensor]:
        """Mean and maximum of nearest cosines; mean, minimum and maximum of lengths."""
        nearest, norms = self.nearest[0].double(), self.norms[0].double()
        figures = {"nearest_mean": nearest.mean(), "nearest_max": nearest.max()}
        return figures | {"norm_mean": norms.mean(), "norm_min": norms.min(), "norm_max": norms.max()}

"""Torchmetrics: state only, right under several ranks; the formulas are in `functional`."""

from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional
from metasae_lightning.step import Codes


class Reconstruction(Metric):
    """FVU and L0 from global sums, not from a mean of batch ratios.

    >>> metric = Reconstruction(d_in=1)
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> metric.update(x, torch.ones(2, 1), Codes.from_dense(torch.tensor([[1.0, 1.0], [0.0, 0.0]])))
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'fvu': 1.0, 'l0': 1.0}
    """

    full_state_update = False
    tokens: Tensor
    total: Tensor
    squares: Tensor
    error: Tensor
    active: Tensor

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("tokens", "squares", "error", "active"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"], codes: Codes) -> None:
        """Add a batch."""
        tokens, total, squares, error = functional.reconstruction_sums(x, reconstruction)
        self.tokens += tokens
        self.total += total
        self.squares += squares
        self.error += error
        self.active += codes.values.numel()

    def compute(self) -> dict[str, Tensor]:
        """FVU and mean L0 over everything seen."""
        sums = (self.tokens, self.total, self.squares, self.error)
        return {"fvu": functional.fvu_of_sums(sums), "l0": self.active / self.tokens}


class DeadLatents(Metric):
    """Share of latents that never fired over what was seen.

    >>> metric = DeadLatents(d_sae=4)
    >>> metric.update(Codes.from_dense(torch.tensor([[1.0, 0.0, 2.0, 0.0]])))
    >>> metric.compute().item()
    0.5
    """

    full_state_update = False
    firings: Tensor

    def __init__(self, d_sae: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Codes) -> None:
        """Add a batch."""
        self.firings += codes.firings()

    def compute(self) -> Tensor:
        """See the class."""
        return (self.firings == 0).double().mean()


class FeatureRecovery(Metric):
    """How well decoder rows recover known feature directions: mean absolute cosine under the best one-to-one match (MCC).

    >>> metric = FeatureRecovery(torch.eye(2))
    >>> metric.update(torch.tensor([[0.0, -1.0], [2.0, 0.0], [1.0, 1.0]]))
    >>> metric.compute().item()
    1.0
    """

    full_state_update = False
    features: Tensor
    cosines: Tensor

    def __init__(self, features: Float[Tensor, "feature d_in"], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("features", functional.unit_rows(features.detach().float()))
        self.add_state("cosines", torch.zeros(0), dist_reduce_fx=None)

    def update(self, W_dec: Float[Tensor, "d_sae d_in"]) -> None:
        """Take a decoder; the last one counts."""
        self.cosines = (functional.unit_rows(W_dec.detach().float()) @ self.features.T).abs()

    def compute(self) -> Tensor:
        """See the class."""
        rows, columns = linear_sum_assignment(self.cosines.cpu().numpy(), maximize=True)
        return self.cosines[torch.as_tensor(rows), torch.as_tensor(columns)].mean()

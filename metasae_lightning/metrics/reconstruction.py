"""Torchmetric of reconstruction quality."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional
from metasae_lightning.compute.row_chunks import is_blocked
from metasae_lightning.step import Codes

# Bins of norms: sixteenths of an octave, from 2^-20 to 2^40.
OCTAVES, PARTS = (-20, 40), 16

# Tokens of one product of `sums_by_bin`.
PRODUCT_ROWS = 8192


def sums_by_bin(bins: Int[Tensor, " row"], values: Float[Tensor, "row figure"], count: int) -> Float[Tensor, "bin figure"]:
    """The sum of the rows in each bin, as a product: on a GPU additions to a bin would end in any order, with other bits.

    >>> sums_by_bin(torch.tensor([1, 0, 1]), torch.tensor([[1.0], [2.0], [4.0]]), 3).tolist()
    [[2.0], [5.0], [0.0]]
    """
    numbers, total = torch.arange(count, device=bins.device)[:, None], values.new_zeros(count, values.shape[1])
    for chunk, rows in zip(bins.split(PRODUCT_ROWS), values.split(PRODUCT_ROWS), strict=True):
        total += (numbers == chunk).to(values.dtype) @ rows
    return total


class Reconstruction(Metric):
    """Quality of reconstructions, from sums over all tokens and not from a mean of batch ratios.

    `fvu = sum ||x - xhat||^2 / sum ||x - mean||^2` is the fraction of variance unexplained, `cosine` the mean cosine, `l2_ratio` the mean
    of `||xhat|| / ||x||`, and `gamma = sum ||xhat||^2 / sum <xhat, x>` the relative reconstruction bias (below 1, reconstructions are
    too short). `l0` is the mean number of active latents per token. `l1` is the mean sum of their absolute values, in the activations'
    unit. `error_q1` to `error_q4` are `sum ||x - xhat||^2 / sum ||x||^2` over each quarter of the tokens by `||x||`, the shortest first.

    >>> metric = Reconstruction(d_in=1)
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> metric.update(x, torch.ones(2, 1), Codes.from_dense(torch.tensor([[1.0, 1.0], [0.0, 0.0]])))
    >>> {name: metric.compute()[name].item() for name in ("fvu", "l0", "l1", "gamma")}
    {'fvu': 1.0, 'l0': 1.0, 'l1': 1.0, 'gamma': 1.0}
    """

    full_state_update = False
    tokens: Tensor
    total: Tensor
    squares: Tensor
    error: Tensor
    active: Tensor
    size: Tensor
    cosine: Tensor
    ratio: Tensor
    length: Tensor
    along: Tensor
    by_norm: Tensor

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("tokens", "squares", "error", "active", "size", "cosine", "ratio", "length", "along"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        # Sums in each bin: tokens, squared error, squared norm.
        self.add_state("by_norm", torch.zeros(3, (OCTAVES[1] - OCTAVES[0]) * PARTS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"], codes: Codes) -> None:
        """Add a batch."""
        x, reconstruction = x.double(), reconstruction.double()
        for name, value in zip(("tokens", "total", "squares", "error"), functional.reconstruction_sums(x, reconstruction), strict=True):
            setattr(self, name, getattr(self, name) + value)
        for name, value in zip(("cosine", "ratio", "length", "along"), functional.agreement_sums(x, reconstruction), strict=True):
            setattr(self, name, getattr(self, name) + value)
        self.active += codes.values.numel()
        self.size += codes.values.abs().sum()
        squares = x.square().sum(-1)
        norm_bin = ((squares.clamp(min=1e-300).log2() / 2 - OCTAVES[0]) * PARTS).long().clamp(0, self.by_norm.shape[1] - 1)
        by_token = torch.ones_like(squares), (x - reconstruction).square().sum(-1), squares
        if is_blocked(x):
            for row, values in zip(self.by_norm, by_token, strict=True):
                row.index_add_(0, norm_bin, values)
        else:
            self.by_norm += sums_by_bin(norm_bin, torch.stack(by_token, 1), self.by_norm.shape[1]).T

    def compute(self) -> dict[str, Tensor]:
        """All figures, by name."""
        figures = {"fvu": functional.fvu_of_sums((self.tokens, self.total, self.squares, self.error))}
        figures |= {"cosine": self.cosine / self.tokens, "l2_ratio": self.ratio / self.tokens, "gamma": self.length / self.along}
        figures |= {"l0": self.active / self.tokens, "l1": self.size / self.tokens}
        # A bin that spans two quarters is divided between them.
        tokens, error, squares = self.by_norm
        ends = tokens.cumsum(0)
        for q in range(4):
            within = ends.clamp(max=(q + 1) * self.tokens / 4) - (ends - tokens).clamp(min=q * self.tokens / 4)
            bin_share = within.clamp(min=0) / tokens.clamp(min=1)
            figures[f"error_q{q + 1}"] = (bin_share * error).sum() / (bin_share * squares).sum()
        return figures

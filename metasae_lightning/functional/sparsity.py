"""Formulas of sparse codes: gates of two signs."""

import torch
from jaxtyping import Float
from torch import Tensor

PreActivations = Float[Tensor, "batch d_sae"]
PerLatent = Float[Tensor, " d_sae"]


def signed_gate(z: PreActivations, b_positive: PerLatent, b_negative: PerLatent) -> PreActivations:
    """The rectified code of two gates, `ReLU(z + b_positive)` or `-ReLU(b_negative - z)`, whichever gate is wider open.

    A positive value opens the positive gate, a negative value the negative gate, and 0 neither. Both gates would be open only where
    `-b_positive < z < b_negative`; with equal biases, the sign of `z` then decides.

    >>> z, bias = torch.tensor([[2.0, -2.0, 0.5]]), torch.full((3,), -1.0)
    >>> signed_gate(z, bias, bias).tolist()
    [[1.0, -1.0, 0.0]]
    """
    positive, negative = z + b_positive, b_negative - z
    return torch.where(positive >= negative, positive.relu(), -negative.relu())


def bi_jump_relu(
    z: PreActivations,
    gate: PreActivations,
    *,
    r_positive: PerLatent,
    r_negative: PerLatent,
    b_positive: PerLatent,
    b_negative: PerLatent,
) -> PreActivations:
    """Signed codes: `ReLU(exp(r_positive) z + b_positive)` where `gate > 0`, `-ReLU(b_negative - exp(r_negative) z)` where `gate < 0`.

    No gradient flows through the gate.

    >>> z, zeros = torch.tensor([[2.0, -2.0, 0.5]]), torch.zeros(3)
    >>> bi_jump_relu(z, torch.tensor([[1.0, -1.0, 0.0]]), r_positive=zeros, r_negative=zeros, b_positive=zeros, b_negative=zeros).tolist()
    [[2.0, -2.0, 0.0]]
    """
    positive, negative = (r_positive.exp() * z + b_positive).relu(), (b_negative - r_negative.exp() * z).relu()
    return torch.where(gate > 0, positive, torch.where(gate < 0, -negative, torch.zeros_like(z)))

"""Formulas of sparse codes: gates of two signs, sparsemax, and adaptive weights of an L1 norm."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

PreActivations = Float[Tensor, "batch d_sae"]
PerLatent = Float[Tensor, " d_sae"]
# Number of largest scores that sparsemax sorts at first.
FIRST_SORTED = 256


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


def sparsemax_threshold(scores: PreActivations) -> Float[Tensor, "batch 1"]:
    """The threshold of sparsemax (arXiv 1602.02068), `t` with `sum max(s - t, 0) = 1` in each row; without gradient.

    With scores in descending order, `k = max{j : 1 + j s_j > s_1 + ... + s_j}` and `t = (s_1 + ... + s_k - 1) / k`. Scores of minus
    infinity are left out; a row of such scores alone has the threshold infinity.

    >>> sparsemax_threshold(torch.tensor([[2.0, 1.5, 0.0]])).tolist()
    [[1.25]]
    """
    values = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    width = min(FIRST_SORTED, values.shape[-1])
    while True:
        ordered = values.topk(width).values
        sums = ordered.where(ordered > -torch.inf, 0.0).cumsum(-1)
        counts = torch.arange(1, width + 1, device=values.device, dtype=values.dtype)
        k = (1 + counts * ordered > sums).sum(-1, keepdim=True)
        if width == values.shape[-1] or bool((k < width).all()):
            break
        width = min(4 * width, values.shape[-1])  # the largest scores sorted so far may all be on the support
    threshold = (sums.gather(-1, (k - 1).clamp(min=0)) - 1) / k
    return threshold.where(k > 0, torch.inf)


def sparsemax_support(scores: PreActivations) -> Bool[Tensor, "batch d_sae"]:
    """Whether sparsemax gives each score more than 0.

    >>> sparsemax_support(torch.tensor([[2.0, 1.5, 0.0], [0.1, -0.1, -2.0]])).tolist()
    [[True, True, False], [True, True, False]]
    """
    return scores > sparsemax_threshold(scores)


def sparsemax(scores: PreActivations) -> PreActivations:
    """The nearest point of the probability simplex to each row of scores: `max(s - t, 0)` (see `sparsemax_threshold`), with gradient.

    >>> sparsemax(torch.tensor([[2.0, 1.5, 0.0]])).tolist()
    [[0.75, 0.25, 0.0]]
    """
    return _Sparsemax.apply(scores)  # type: ignore[return-value]


class _Sparsemax(torch.autograd.Function):
    """Forward: the projection. Backward: on the support, the gradient less its mean over the support."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        p = (scores - sparsemax_threshold(scores)).clamp(min=0)
        ctx.save_for_backward(p > 0)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (support,) = ctx.saved_tensors
        gradient = gradients[0] * support
        return gradient - support * gradient.sum(-1, keepdim=True) / support.sum(-1, keepdim=True).clamp(min=1)


def adaptive_weights(
    mean_activations: Float[Tensor, " d_sae"],
    *,
    exponent: float,
    reference_fraction: float,
    min_weight: float,
    max_weight: float,
) -> Float[Tensor, " d_sae"]:
    """The weight of each latent in an adaptive L1 norm, `clamp((ref / max(mean, 1e-5))^exponent, min_weight, max_weight)`.

    `ref` is the mean of the largest `reference_fraction` of the mean activations, at least of one (arXiv 2605.05341). A latent that is
    as active as the reference has weight 1, and a less active one a larger weight.

    >>> limits = {"reference_fraction": 0.5, "min_weight": 0.01, "max_weight": 10.0}
    >>> adaptive_weights(torch.tensor([4.0, 4.0, 1.0, 0.0]), exponent=0.5, **limits).tolist()
    [1.0, 1.0, 2.0, 10.0]
    """
    mean = mean_activations.double()  # the mean of equal numbers is then that number, after rounding to single precision
    reference = mean.topk(max(1, round(reference_fraction * len(mean)))).values.mean()
    weights = (reference / mean.clamp(min=1e-5)).pow(exponent).clamp(min_weight, max_weight)
    return weights.to(mean_activations.dtype)

"""Formulas of a language model's predictions: cross-entropy and KL divergence."""

from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "context position vocabulary"]


def cross_entropy(logits: Logits, tokens: Int[Tensor, "context position"]) -> Float[Tensor, "context position"]:
    """The cross-entropy of each token, `-log p(token)`, in nats; logits and token of a prediction are at the same position.

    >>> import torch
    >>> cross_entropy(torch.zeros(1, 1, 4), torch.tensor([[2]])).exp()
    tensor([[4.]])
    """
    return logits.logsumexp(-1) - logits.gather(-1, tokens[..., None])[..., 0]


def kl_divergence(clean: Logits, other: Logits) -> Float[Tensor, "context position"]:
    """The KL divergence of the other prediction from the clean one, `sum p_clean (log p_clean - log p_other)`, in nats.

    >>> import torch
    >>> kl_divergence(torch.zeros(1, 1, 2), torch.tensor([[[0.0, -torch.inf]]])).item()
    inf
    """
    p, q = clean.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)

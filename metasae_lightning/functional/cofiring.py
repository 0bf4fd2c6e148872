"""Formulas of latents that fire together: phi, its chance level and its bound."""

import torch
from jaxtyping import Float
from torch import Tensor

Counts = Float[Tensor, "*shape"]
BroadcastCounts = Float[Tensor, "*#shape"]


def phi(n11: Counts, n_i: BroadcastCounts, n_j: BroadcastCounts, n: BroadcastCounts | float) -> Counts:
    """Correlation of two binary events from counts, `(n11 n - n_i n_j) / sqrt(n_i (n - n_i) n_j (n - n_j))`; broadcasts.

    An event that always or never happens has correlation 0 with every event. Counts are float64, exact to 2^53.

    >>> both = torch.tensor(2.0, dtype=torch.float64)
    >>> phi(both, both, both, 4.0).item()
    1.0
    """
    spread = (n_i * (n - n_i)).sqrt() * (n_j * (n - n_j)).sqrt()
    return torch.where(spread > 0, (n11 * n - n_i * n_j) / spread.clamp(min=1e-300), 0.0)


def phi_by_chance(n_i: BroadcastCounts, n_j: BroadcastCounts, n: BroadcastCounts | float) -> Counts:
    """Expected `|phi|` of two independent events that happened `n_i` and `n_j` times in n: the chance level of a mean of `|phi|`.

    Given the counts, n11 is hypergeometric, and its mean absolute deviation has a closed form: with `m = n_i n_j / n` and v the least
    integer above m, `E|n11 - m| = 2/n v (n - n_i - n_j + v) P(n11 = v)`, since `x (n - n_i - n_j + x) P(x)` telescopes over x > m.

    >>> count = torch.tensor(1.0, dtype=torch.float64)
    >>> phi_by_chance(count, count, 2.0).item()  # phi is 1 or -1
    1.0
    """
    v = torch.floor(n_i * n_j / n) + 1
    neither = n - n_i - n_j + v
    possible = (v <= torch.minimum(n_i, n_j)) & (neither >= 0) & (n_i < n) & (n_j < n)
    v, neither = torch.where(possible, v, n_i), torch.where(possible, neither, 0.0)
    n_tensor = torch.as_tensor(n, dtype=v.dtype, device=v.device)

    def log_fact(x: Tensor) -> Tensor:
        return torch.lgamma(x + 1)

    log_margins = log_fact(n_i) + log_fact(n - n_i) + log_fact(n_j) + log_fact(n - n_j) - log_fact(n_tensor)
    log_p = log_margins - log_fact(v) - log_fact((n_i - v).clamp(min=0)) - log_fact((n_j - v).clamp(min=0)) - log_fact(neither)
    deviation = 2 / n * v * neither * log_p.exp()
    spread = (n_i * (n - n_i)).sqrt() * (n_j * (n - n_j)).sqrt()
    return torch.where(possible, n * deviation / spread.clamp(min=1e-300), 0.0)


def cofiring_bound(phi_sa: Float[Tensor, "*shape"], phi_sb: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The smallest phi of two events A and B, given the phi of each with a third event S.

    `phi_AB >= phi_SA phi_SB - sqrt((1 - phi_SA^2)(1 - phi_SB^2))`, because a correlation matrix is positive semi-definite. If the bound is
    above 0, A and B are not disjoint senses of S.

    >>> round(cofiring_bound(torch.tensor(0.71), torch.tensor(0.80)).item(), 2)
    0.15
    """
    return phi_sa * phi_sb - ((1 - phi_sa.square()) * (1 - phi_sb.square())).clamp(min=0).sqrt()

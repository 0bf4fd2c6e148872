"""The formula of interactions between active latents."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag


def pairwise_interactions(
    latents: Int[Tensor, " nnz"], values: Float[Tensor, " nnz"], lengths: Int[Tensor, " batch"], V: Float[Tensor, "d_sae rank"]
) -> Float[Tensor, "batch rank"]:
    """The sum over all pairs of a token's active latents, `u = sum_(i<j) f_i f_j v_i v_j`, where `v_i v_j` multiplies entry by entry.

    It is computed as `1/2 ((sum_i f_i v_i)^2 - sum_i (f_i v_i)^2)`, the second-order term of a factorisation machine (Rendle 2010), so
    that no pair is formed. The nonzeros are ordered by token; `lengths` tells how many each token has.

    >>> import torch
    >>> V = torch.tensor([[1.0], [2.0], [3.0]])
    >>> pairwise_interactions(torch.tensor([0, 1, 2]), torch.tensor([1.0, 1.0, 2.0]), torch.tensor([3, 0]), V).tolist()
    [[20.0], [0.0]]
    """
    starts = lengths.cumsum(0) - lengths
    total = embedding_bag(latents, V, starts, mode="sum", per_sample_weights=values)
    squares = embedding_bag(latents, V.square(), starts, mode="sum", per_sample_weights=values.square())
    return (total.square() - squares) / 2

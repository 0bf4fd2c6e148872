"""Which latent of one SAE is which of another, one to one."""

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from metasae_lightning import functional

# Above so many latents only each one's nearest are candidates: the whole matrix would take hours.
DENSE = 6000


def matched(
    W_a: Float[Tensor, "d_a d_in"], W_b: Float[Tensor, "d_b d_in"], *, dense: int = DENSE, nearest: int = 32
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"], Float[Tensor, " pair"]]:
    """The one-to-one match of decoder rows with the largest sum of cosines (the Hungarian method), and its cosines.

    >>> matched(torch.eye(2), torch.tensor([[0.0, 3.0], [1.0, 1.0]]))
    (tensor([0, 1]), tensor([1, 0]), tensor([0.7071, 1.0000]))
    """
    a, b = functional.unit_rows(W_a.float()), functional.unit_rows(W_b.float())
    if max(len(a), len(b)) <= dense:
        cosines = a @ b.T
        rows, columns = (torch.as_tensor(side) for side in linear_sum_assignment(cosines.cpu().numpy(), maximize=True))
        return rows, columns, cosines[rows, columns]
    return _sparse(a, b, nearest)


def _sparse(a: Tensor, b: Tensor, nearest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Among each row's nearest; a row whose nearest all went to others is left without a match."""
    rows, columns, values = list[Tensor](), list[Tensor](), list[Tensor]()
    for begin in range(0, len(a), 1024):
        top = (a[begin : begin + 1024] @ b.T).topk(min(nearest, len(b)))
        rows.append(torch.arange(begin, begin + len(top.values))[:, None].expand_as(top.indices).flatten())
        columns.append(top.indices.flatten().cpu())
        values.append(top.values.flatten().cpu())
    row, column, value = torch.cat(rows), torch.cat(columns), torch.cat(values)
    # A column of its own for each row, dearer than any cosine: then a full match always exists. Costs must not be 0.
    own = np.arange(len(a))
    costs = np.concatenate([2 - value.double().numpy(), np.full(len(a), 10.0)])
    places = np.concatenate([row.numpy(), own]), np.concatenate([column.numpy(), len(b) + own])
    found_rows, found_columns = min_weight_full_bipartite_matching(coo_matrix((costs, places), shape=(len(a), len(b) + len(a))).tocsr())
    real = found_columns < len(b)
    one, other = torch.as_tensor(found_rows[real]).long(), torch.as_tensor(found_columns[real]).long()
    return one, other, (a[one.to(a.device)] * b[other.to(b.device)]).sum(1).cpu()

"""Masks over tokens: which are trained on, which document each may attend to."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def content(
    tokens: Int[Tensor, "context position"], special: Int[Tensor, " special"], skip_positions: int = 0
) -> Bool[Tensor, "context position"]:
    """Which tokens are trained on: text, past the first positions. The one mask, for training and for every evaluation.

    >>> content(torch.tensor([[1, 7, 2, 5]]), torch.tensor([1, 2])).tolist()
    [[False, True, False, True]]
    >>> content(torch.tensor([[1, 7, 2, 5]]), torch.tensor([1, 2]), skip_positions=2).tolist()
    [[False, False, False, True]]
    """
    keep = torch.isin(tokens, special, invert=True)
    keep[:, :skip_positions] = False
    return keep


def own_document(
    tokens: Int[Tensor, "context position"], separator: int, *, begun: bool
) -> Bool[Tensor, "context position position"] | None:
    """Which tokens each may attend to: earlier ones of its own document and, where contexts are `begun` by BOS, that one.

    A document ends with its separator. Nothing is returned where no context holds a boundary, and plain attention will do.

    >>> own_document(torch.tensor([[7, 2, 5]]), 2, begun=False).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    >>> own_document(torch.tensor([[2, 7, 5]]), 2, begun=True) is None
    True
    """
    ends = tokens == separator
    ends[:, : int(begun)] = False
    if not ends[:, :-1].any():
        return None
    owner = ends.cumsum(1) - ends.int()
    visible = (owner[:, :, None] == owner[:, None, :]).tril()
    visible[:, :, : int(begun)] = True
    return visible


def number_documents(
    tokens: Int[Tensor, "context position"], separator: int | None, *, begun: bool, first: int = 0
) -> tuple[Int[Tensor, "context position"], int]:
    """The number of the document that each token is of, counted on from `first`, and the number that the next context begins with.

    Contexts follow on each other; a document ends with its separator. Where none tells, each context is a document.

    >>> number_documents(torch.tensor([[7, 2, 5], [6, 2, 9]]), 2, begun=False)
    (tensor([[0, 0, 1],
            [1, 1, 2]]), 2)
    """
    if separator is None:
        return first + torch.arange(len(tokens))[:, None].expand_as(tokens), first + len(tokens)
    ends = tokens == separator
    ends[:, : int(begun)] = False
    flat = ends.flatten().long()
    return (first + flat.cumsum(0) - flat).view_as(tokens), first + int(flat.sum())


def ordinary(activations: Float[Tensor, "row d_model"], max_norm_ratio: float) -> Bool[Tensor, " row"]:
    """Which rows are no attention sinks: norms up to so many times the batch's median.

    >>> ordinary(torch.tensor([[1.0], [2.0], [40.0]]), 10.0).tolist()
    [True, True, False]
    """
    norms = activations.norm(dim=-1)
    return norms <= max_norm_ratio * norms.median()

"""Masks over tokens: which are trained on, which document each may attend to."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def content(
    tokens: Int[Tensor, "context position"], special: Int[Tensor, " special"], skip_positions: int = 0
) -> Bool[Tensor, "context position"]:
    """Mask of the tokens that are trained on: no special tokens, none of the first `skip_positions`. Evaluations use the same mask.

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
    """Attention mask: a token sees earlier tokens of its own document and, if contexts are `begun` by BOS, that BOS.

    A document ends with its separator. Returns None if no context contains a boundary, where plain causal attention is the same.

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
    """Document id of each token, counted from `first`, and the id at which the next context begins.

    Contexts are consecutive, and a document ends with its separator. Without a separator each context is a document.

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
    """Mask of rows whose norm is at most `ratio` times the batch's median; others are attention sinks.

    >>> ordinary(torch.tensor([[1.0], [2.0], [40.0]]), 10.0).tolist()
    [True, True, False]
    """
    norms = activations.norm(dim=-1)
    return norms <= max_norm_ratio * norms.median()

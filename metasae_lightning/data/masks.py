"""Masks over tokens and rows: the tokens trained on, the tokens that attention sees, and the rows of ordinary norm."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def trainable_tokens(
    tokens: Int[Tensor, "context position"], special: Int[Tensor, " special"], skip_positions: int = 0
) -> Bool[Tensor, "context position"]:
    """Mask of the tokens that SAEs are trained and evaluated on: no special token, and no token at the first `skip_positions` positions.

    >>> trainable_tokens(torch.tensor([[1, 7, 2, 5]]), torch.tensor([1, 2])).tolist()
    [[False, True, False, True]]
    >>> trainable_tokens(torch.tensor([[1, 7, 2, 5]]), torch.tensor([1, 2]), skip_positions=2).tolist()
    [[False, False, False, True]]
    """
    mask = torch.isin(tokens, special, invert=True)
    mask[:, :skip_positions] = False
    return mask


def document_mask(
    tokens: Int[Tensor, "context position"], separator: int, *, starts_with_bos: bool
) -> Bool[Tensor, "context position position"] | None:
    """Attention mask that separates documents: a token sees the earlier tokens of its own document, itself, and the BOS of its context.

    A document ends with its separator. The result is None where no context contains the end of a document before its last token: causal
    attention is then the same.

    >>> document_mask(torch.tensor([[7, 2, 5]]), 2, starts_with_bos=False).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    >>> document_mask(torch.tensor([[2, 7, 5]]), 2, starts_with_bos=True) is None
    True
    """
    documents = documents_in_contexts(tokens, separator, starts_with_bos=starts_with_bos)
    return None if documents is None else same_document(documents, starts_with_bos=starts_with_bos)


def documents_in_contexts(
    tokens: Int[Tensor, "context position"], separator: int, *, starts_with_bos: bool
) -> Int[Tensor, "context position"] | None:
    """The number of each token's document, counted in each context; None where each context has one document only.

    >>> documents_in_contexts(torch.tensor([[7, 2, 5], [6, 8, 2]]), 2, starts_with_bos=False).tolist()
    [[0, 0, 1], [0, 0, 0]]
    """
    ends = tokens == separator
    ends[:, : int(starts_with_bos)] = False
    return ends.cumsum(1) - ends.int() if ends[:, :-1].any() else None


def same_document(documents: Int[Tensor, "context position"], *, starts_with_bos: bool) -> Bool[Tensor, "context position position"]:
    """Attention mask from the number of each token's document: a token sees its document up to itself, and the BOS of its context.

    >>> same_document(torch.tensor([[0, 0, 1]]), starts_with_bos=True).int().tolist()
    [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    """
    visible = (documents[:, :, None] == documents[:, None, :]).tril()
    visible[:, :, : int(starts_with_bos)] = True
    return visible


def number_documents(
    tokens: Int[Tensor, "context position"], separator: int | None, *, starts_with_bos: bool, first: int = 0
) -> tuple[Int[Tensor, "context position"], int]:
    """The document number of each token, counted from `first`, and the document number of the token that follows.

    The contexts are consecutive pieces of one text, in which a document ends with its separator. Without a separator, each context is a
    document.

    >>> number_documents(torch.tensor([[7, 2, 5], [6, 2, 9]]), 2, starts_with_bos=False)
    (tensor([[0, 0, 1],
            [1, 1, 2]]), 2)
    """
    if separator is None:
        return first + torch.arange(len(tokens))[:, None].expand_as(tokens), first + len(tokens)
    ends = tokens == separator
    ends[:, : int(starts_with_bos)] = False
    flat = ends.flatten().long()
    return (first + flat.cumsum(0) - flat).view_as(tokens), first + int(flat.sum())


def within_norm(activations: Float[Tensor, "row d_model"], max_norm_ratio: float) -> Bool[Tensor, " row"]:
    """Mask of the rows whose norm is at most `max_norm_ratio` times the median norm, which leaves out attention sinks.

    >>> within_norm(torch.tensor([[1.0], [2.0], [40.0]]), 10.0).tolist()
    [True, True, False]
    """
    norms = activations.norm(dim=-1)
    return norms <= max_norm_ratio * norms.median()

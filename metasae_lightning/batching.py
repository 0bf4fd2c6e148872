"""What batches are made of and how: their sizes, and which tokens and rows they hold."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.errors import InputError

Exhausted = Literal["epoch", "end"]
"""What follows when a corpus is exhausted: another epoch in another order, or the end."""
Storage = Literal["float32", "bfloat16", "float16"]


def special_ids(tokenizer: Any) -> list[int]:
    """A tokenizer's special tokens; TransformerLens names some that are not in its vocabulary."""
    return sorted({token for token in tokenizer.all_special_ids if token is not None})


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


@dataclass(frozen=True)
class Batching:
    """Everything that a sequence of batches is a function of, but for the corpus, the model and the place among ranks.

    Its fields are the arguments of `ActivationsDataModule`, which explains them.
    """

    batch_size: int
    context_size: int
    buffer_size: int
    held_out: float = 0.02
    prepend_bos: bool = True
    skip_positions: int = 0
    max_norm_ratio: float | None = None
    forward_batch: int = 32
    seed: int = 0
    exhausted: Exhausted = "epoch"
    cross_document_attention: bool = False
    buffer_dtype: Storage = "float32"

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("context_size", 2), ("forward_batch", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.buffer_size < self.batch_size:
            raise InputError(f"buffer_size must hold a batch of {self.batch_size} tokens, got {self.buffer_size}")
        if not 0 <= self.skip_positions < self.context_size:
            raise InputError(f"skip_positions must be in [0, context_size={self.context_size}), got {self.skip_positions}")
        if self.max_norm_ratio is not None and self.max_norm_ratio <= 1:
            raise InputError(f"max_norm_ratio must be more than 1, since it is times the median norm, got {self.max_norm_ratio}")
        if not 0 <= self.held_out < 0.5:
            raise InputError(f"held_out must be in [0, 0.5): that share is validation and as much again is test, got {self.held_out}")
        if self.buffer_dtype not in get_args(Storage):
            raise InputError(f"buffer_dtype must be one of {', '.join(get_args(Storage))}, got {self.buffer_dtype}")

    @property
    def dtype(self) -> torch.dtype:
        """What the buffer stores."""
        return getattr(torch, self.buffer_dtype)

    @property
    def block(self) -> int:
        """Rows that are shuffled among each other: whole batches."""
        return self.buffer_size // self.batch_size * self.batch_size

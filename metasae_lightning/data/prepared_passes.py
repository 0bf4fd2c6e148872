"""The tokens of forward passes, prepared on the host: contexts, masks and indices. What a GPU reads is in pinned memory."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from metasae_lightning.corpora.tokenization import PackedTokens, TokenizedDocuments, special_ids
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.masks import documents_in_contexts, trainable_tokens


@dataclass(frozen=True)
class PreparedPass:
    """The contexts of one forward pass, and what the host knows about them before the model runs."""

    tokens: Int[Tensor, "context position"]
    """The contexts."""
    mask: Bool[Tensor, "context position"]
    """Mask of the trainable tokens."""
    row_indices: Int[Tensor, " row"]
    """Indices of the trainable tokens among all tokens of the pass."""
    documents: Int[Tensor, "context position"] | None
    """The number of each token's document in its context; None if attention is only causal."""
    digest: str
    """A hash of the tokens."""
    position: dict[str, Any]
    """The position in the corpus before this pass."""
    next_position: dict[str, Any]
    """The position in the corpus after this pass."""
    read_position: dict[str, Any]
    """The position in the corpus after all text that was read to pack this pass."""


def prepare_passes(packed: PackedTokens, source: TokenizedDocuments, batching: Batching, *, pin: bool) -> Iterator[PreparedPass]:
    """The passes over `packed`, in order, each with `batching.contexts_in_pass` contexts; the last may have fewer.

    Args:
        packed: The contexts.
        source: The documents that are packed; their tokenizer names the special tokens.
        batching: Sizes and masks.
        pin: Whether tokens, row indices and documents are in pinned memory, from which a GPU copies them without a wait of the host.
    """
    special = torch.tensor(special_ids(source.tokenizer), dtype=torch.long)
    separator = None if batching.cross_document_attention or not packed.separator else packed.separator[0]
    position = packed.state()
    while len(tokens := packed.next_contexts(batching.contexts_in_pass)):
        mask = trainable_tokens(tokens, special, batching.skip_positions)
        rows = mask.flatten().nonzero().flatten()
        documents = None if separator is None else documents_in_contexts(tokens, separator, starts_with_bos=bool(packed.prefix))
        digest = hashlib.blake2b(tokens.numpy().tobytes(), digest_size=8).hexdigest()
        if pin:
            tokens, rows = tokens.pin_memory(), rows.pin_memory()
            documents = None if documents is None else documents.pin_memory()
        next_position = packed.state()
        yield PreparedPass(tokens, mask, rows, documents, digest, position, next_position, packed.read_position)
        position = next_position

"""Held-out text in the order of the corpus, with document ids. Every evaluation reads the same passages."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.forward_passes import RowReader
from metasae_lightning.data.masks import number_documents, within_norm
from metasae_lightning.data.synthetic import SyntheticStream
from metasae_lightning.evaluation.result_cache import hash_weights

# Synthetic tokens have no documents; this many count as one document.
SYNTHETIC_DOCUMENT = 64

Read = Callable[[], tuple[Float[Tensor, "row d_in"], Bool[Tensor, "context position"]]]


@dataclass(frozen=True)
class Passage:
    """Some contexts of held-out text. The language model runs on them when `read` is called."""

    number: int
    """Index in the sequence of passages."""
    tokens: Int[Tensor, "context position"]
    """Token ids; zeros for synthetic data."""
    documents: Int[Tensor, "context position"]
    """Document id of each token."""
    visible: Bool[Tensor, "context position position"] | None
    """Attention mask, if documents do not attend to each other."""
    read: Read
    """Returns the activations of the counted tokens, one row each, and the mask of counted tokens: text, past the first positions, no
    attention sinks."""

    @property
    def text_hash(self) -> str:
        """Hash of token and document ids. It shows that a corpus has changed under the same name."""
        return hash_weights({"tokens": self.tokens, "documents": self.documents})


def passages(stream: Any, tokens: int) -> Iterator[Passage]:
    """Passages of a split until they hold `tokens` rows or the split ends; of a synthetic stream, all passages."""
    return _synthetic_passages(stream) if isinstance(stream, SyntheticStream) else _text_passages(stream, tokens)


def stream_cache_key(stream: Any) -> dict[str, Any]:
    """Cache key of a stream's passages."""
    if isinstance(stream, SyntheticStream):
        planted = hash_weights({"features": stream.features, "first": stream.batch(0).activations})
        return {"planted": planted, "split": stream.split, "seed": stream.seed, "batch_size": stream.batch_size}
    return stream.description()


def json_values(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with values that JSON can hold: every value that is no number, boolean or None becomes a string."""
    return {key: value if isinstance(value, int | float | bool | None) else str(value) for key, value in settings.items()}


def split_stream(data: Any, split: str, tokens: int) -> Any:
    """The stream of `tokens` tokens of a split, or of one batch if a batch has more tokens."""
    return data.stream(split, max(tokens, getattr(data, "batching", data).batch_size))


def _text_passages(stream: ActivationStream, tokens: int) -> Iterator[Passage]:
    rows, number, document = stream.row_reader(), 0, 0
    try:
        while rows.number < tokens and (context_and_mask := rows.next_pass()) is not None:
            rows.forget_before(rows.number // stream.batching.block_size)
            context, keep = context_and_mask
            documents, document = number_documents(context, rows.separator, starts_with_bos=rows.starts_with_bos, first=document)
            reader = _reader(rows, context, keep, stream.batching.max_norm_ratio)
            yield Passage(number, context, documents, rows.attention_mask(context), reader)
            number += 1
    finally:
        rows.close()


def _reader(rows: RowReader, tokens: Tensor, keep: Tensor, max_norm_ratio: float | None) -> Read:
    def read() -> tuple[Tensor, Tensor]:
        activations, counted = select_rows(rows.forward(tokens).flatten(0, 1), keep.flatten()), keep.clone()
        if max_norm_ratio is not None:
            ordinary = within_norm(activations, max_norm_ratio).cpu()
            counted[keep] = ordinary
            activations = select_rows(activations, ordinary)
        return activations, counted

    return read


def select_rows(activations: Float[Tensor, "row d_in"], chosen: Bool[Tensor, " row"]) -> Float[Tensor, "chosen d_in"]:
    """The rows that a mask on the CPU chooses. The host does not wait for a GPU, as it would for a mask there."""
    return activations.index_select(0, chosen.nonzero().flatten().to(activations.device, non_blocking=True))


def _synthetic_passages(stream: SyntheticStream) -> Iterator[Passage]:
    for number in range(len(stream)):
        position = number * stream.batch_size + torch.arange(stream.batch_size)

        def read(number: int = number) -> tuple[Tensor, Tensor]:
            return stream.batch(number).activations, torch.ones(1, stream.batch_size, dtype=torch.bool)

        yield Passage(number, torch.zeros(1, stream.batch_size, dtype=torch.long), position[None] // SYNTHETIC_DOCUMENT, None, read)

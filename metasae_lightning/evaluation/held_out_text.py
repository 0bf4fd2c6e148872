"""Held-out text in the corpus's order, with the documents it is of: what evaluations read, each of them the same."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.forward_passes import Rows
from metasae_lightning.data.masks import number_documents, ordinary
from metasae_lightning.data.synthetic import SyntheticStream
from metasae_lightning.evaluation.result_cache import fingerprint

# Planted tokens have no documents; so many are taken for one.
PLANTED_DOCUMENT = 64

Read = Callable[[], tuple[Float[Tensor, "row d_in"], Bool[Tensor, "context position"]]]


@dataclass(frozen=True)
class Passage:
    """Some contexts of held-out text; the model runs on them when they are read."""

    number: int
    """Its place in the sequence."""
    tokens: Int[Tensor, "context position"]
    """Its tokens; of planted data, which have none, zeros."""
    documents: Int[Tensor, "context position"]
    """The number of the document that each is of."""
    visible: Bool[Tensor, "context position position"] | None
    """What each may attend to, where documents are kept apart."""
    read: Read
    """Activations of the tokens that SAEs are judged on, a row each, and which these are: text, past the first positions, no sinks."""

    @property
    def digest(self) -> str:
        """What tells its text from another: a corpus may change under its name."""
        return fingerprint({"tokens": self.tokens, "documents": self.documents})


def passages(stream: Any, tokens: int) -> Iterator[Passage]:
    """The passages of a split that hold at least so many rows, or as many as there are."""
    return _planted(stream) if isinstance(stream, SyntheticStream) else _text(stream, tokens)


def identity(stream: Any) -> dict[str, Any]:
    """What the passages of a stream are a function of."""
    if isinstance(stream, SyntheticStream):
        planted = fingerprint({"features": stream.features, "first": stream.batch(0).activations})
        return {"planted": planted, "split": stream.split, "seed": stream.seed, "batch_size": stream.batch_size}
    return stream.identity()


def as_record(of: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    return {key: value if isinstance(value, int | float | bool | None) else str(value) for key, value in of.items()}


def held_out(data: Any, split: str, tokens: int) -> Any:
    """A split's stream, of one batch at least."""
    return data.stream(split, max(tokens, getattr(data, "batching", data).batch_size))


def _text(stream: ActivationStream, tokens: int) -> Iterator[Passage]:
    rows, number, document = stream.rows(), 0, 0
    try:
        while rows.number < tokens and (taken := rows.take()) is not None:
            rows.forget(rows.number // stream.batching.block)
            context, keep = taken
            documents, document = number_documents(context, rows.separator, begun=rows.begun, first=document)
            yield Passage(number, context, documents, rows.visible(context), _reader(rows, context, keep, stream.batching.max_norm_ratio))
            number += 1
    finally:
        rows.close()


def _reader(rows: Rows, tokens: Tensor, keep: Tensor, max_norm_ratio: float | None) -> Read:
    def read() -> tuple[Tensor, Tensor]:
        found, counted = rows.forward(tokens)[keep.to(rows.language_model.device)], keep.clone()
        if max_norm_ratio is not None:
            kept = ordinary(found, max_norm_ratio)
            counted[keep] = kept.cpu()
            found = found[kept]
        return found, counted

    return read


def _planted(stream: SyntheticStream) -> Iterator[Passage]:
    for number in range(len(stream)):
        place = number * stream.batch_size + torch.arange(stream.batch_size)

        def read(number: int = number) -> tuple[Tensor, Tensor]:
            return stream.batch(number).activations, torch.ones(1, stream.batch_size, dtype=torch.bool)

        yield Passage(number, torch.zeros(1, stream.batch_size, dtype=torch.long), place[None] // PLANTED_DOCUMENT, None, read)

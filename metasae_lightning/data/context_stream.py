"""The stream of whole contexts of a language model, with the tokens that it ran on."""

from collections.abc import Generator
from typing import Any, final

from metasae_lightning.compute.transfers import copy_to
from metasae_lightning.data.forward_passes import RowReader
from metasae_lightning.data.model_stream import ModelStream
from metasae_lightning.data.stream import PreparedBatch
from metasae_lightning.errors import InputError
from metasae_lightning.step import Contexts


@final
class ContextStream(ModelStream):
    """Batches of whole contexts in the order of the corpus: the activations of their trainable tokens, and the contexts.

    A batch has `batch_size` tokens with the special ones, which have no row. Rows are not shuffled; documents come in the corpus's order,
    which depends on the seed. The model runs on `forward_batch` contexts at a time.
    """

    def _count(self, reader: RowReader) -> int:
        """The tokens of the whole contexts that are left, up to the budget, with the special ones."""
        count = 0
        while count < self.part.tokens and (next_pass := reader.next_pass()) is not None:
            count += next_pass[0].numel()
            reader.forget_before(reader.number)
        return min(count, self.part.tokens)

    def _make_batches(self, position: dict[str, Any]) -> Generator[PreparedBatch, None, None]:
        """The batches after a position, each from one prepared pass."""
        cursor = position["cursor"] or {"tokens": position["base"], "number": 0}
        reader = self._reader(self.part.rank, cursor)
        try:
            for number in range(position["batches"] + 1, len(self) + 1):
                prepared = reader.next_prepared_pass()
                if prepared is None or len(prepared.tokens) < self.batching.contexts_in_pass:
                    raise InputError(f"corpus: {self.corpus.description()} ended earlier than when it was counted")
                reader.forget_before(reader.number)
                rows = copy_to(reader.run(prepared, contexts_at_once=self.batching.forward_batch), self.home)
                contexts = Contexts(prepared.tokens, prepared.row_indices, reader.visible(prepared))
                batch, ready = self._batch(rows, self.language_model.widths, contexts), self._record_ready()
                cursor = {"tokens": prepared.next_position, "number": 0}
                after = {**position, "batches": number, "cursor": cursor, "reached": prepared.read_position}
                yield PreparedBatch(batch, after, ready)
        finally:
            reader.close()

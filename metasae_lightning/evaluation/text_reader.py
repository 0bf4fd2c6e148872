"""The user's texts as contexts of a language model, and the model's activations on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.corpora.tokenization import TOKENIZER_LOCK, boundary_tokens, special_ids
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.masks import trainable_tokens
from metasae_lightning.errors import InputError
from metasae_lightning.lm.base import LanguageModel


@dataclass(frozen=True)
class TextReader:
    """Reads texts with the settings of an SAE's training: BOS, context size and skipped positions. Each text is one context."""

    model: LanguageModel
    """The loaded model."""
    batching: Batching
    """How texts become contexts: BOS, context size, skipped positions."""

    def tokens(self, text: str, name: str = "text") -> Int[Tensor, " position"]:
        """The tokens of a text's context. A text without tokens or with too many is an `InputError`, in which it is called `name`."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} holds half of a character") from error
        prefix, _ = boundary_tokens(self.model.tokenizer, self.batching.prepend_bos, self.model.name)
        with TOKENIZER_LOCK:
            ids = self.model.tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0]
        if not ids:
            raise InputError(f"{name} is empty")
        if (count := len(prefix) + len(ids)) > self.batching.context_size:
            raise InputError(f"{name} has {count} tokens, and the SAEs were trained on contexts of {self.batching.context_size}")
        return torch.tensor([*prefix, *ids])

    def is_trained_on(self, tokens: Int[Tensor, "context position"]) -> Bool[Tensor, "context position"]:
        """Mask of the tokens that the SAEs are trained on: no special token, and none of the skipped positions."""
        return trainable_tokens(tokens, torch.tensor(special_ids(self.model.tokenizer)), self.batching.skip_positions)

    def activations(self, contexts: Sequence[Int[Tensor, " _"]]) -> Iterator[tuple[int, Float[Tensor, "_ d_model"]]]:
        """The index of each context with the activations on it, shortest contexts first, several in one forward pass."""
        by_length = sorted(range(len(contexts)), key=lambda index: len(contexts[index]))
        for begin in range(0, len(by_length), self.batching.forward_batch):
            indices = by_length[begin : begin + self.batching.forward_batch]
            longest = len(contexts[indices[-1]])
            # A causal model does not see the padding after a text. It repeats the last token, because some backends mask padding tokens.
            padded = [torch.cat([contexts[i], contexts[i][-1:].expand(longest - len(contexts[i]))]) for i in indices]
            for index, rows in zip(indices, self.model.activations(torch.stack(padded)), strict=True):
                yield index, rows[: len(contexts[index])]

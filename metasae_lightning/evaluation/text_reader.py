"""The user's texts as contexts of a language model, and the model's activations on them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.corpora.tokenization import TOKENIZER_LOCK, boundary_tokens, special_ids
from metasae_lightning.data.batching import Batching
from metasae_lightning.data.masks import trainable_tokens
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.top_contexts import Spelling
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.lm.predictions import Edit


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

    def greedy(
        self, tokens: Int[Tensor, " position"], count: int, edit_of: Callable[[Int[Tensor, "context position"]], Edit] | None = None
    ) -> list[int]:
        """The most likely next tokens, one after another, up to the end of the text or of the context. The model must be complete.

        `edit_of` gives the edit of the activations for the tokens of each forward pass; None edits nothing.
        """
        contexts, found = tokens[None], list[int]()
        for _ in range(min(count, self.batching.context_size - len(tokens))):
            edit = None if edit_of is None else edit_of(contexts)
            following = int(self.model.logits(contexts, edit=edit)[0, -1].argmax())
            if following == self.model.tokenizer.eos_token_id:
                break
            found.append(following)
            contexts = torch.cat([contexts, torch.tensor([[following]])], 1)
        return found

    def text_after(self, tokens: Int[Tensor, " position"], continuation: Sequence[int]) -> str:
        """The text of a continuation of some tokens."""
        before = tokens.tolist()
        return "".join(Spelling(self.model.tokenizer).token_texts([*before, *continuation])[len(before) :])

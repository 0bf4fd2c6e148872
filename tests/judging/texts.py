"""Codes on hand-made text, as an SAE's are collected."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metasae_lightning.step import Codes

LENGTH = 64
END = "<|endoftext|>"


def piece_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are pieces of at most four letters, other characters alone, with a space before them in the same token."""
    pieces = Regex(r" ?[A-Za-z]{1,4}|\s|[^A-Za-z\s]")
    splitter = pre_tokenizers.Split(pieces, "isolated")
    vocabulary = dict.fromkeys([END, "?", "x", *(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))])
    made = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(vocabulary)}, unk_token="?"))
    made.pre_tokenizer = splitter
    # Pieces are joined as they are, and the special token is decoded to nothing.
    made.decoder = decoders.Sequence([decoders.Replace(END, ""), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


class HandMade:
    """Collected codes of latents that fire on given tokens of given documents, packed into contexts of 64 tokens."""

    def __init__(self, texts: Sequence[str], activations: Any, *, tokenizer: Any, contexts: int = 5):
        """`activations(document, tokens)` gives the activations of all latents on each token, a row a token."""
        self.tokenizer = tokenizer
        ids, owner, rows = list[int](), list[int](), list[torch.Tensor]()
        for document, text in enumerate(texts):
            tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            ids += tokens
            owner += [document] * len(tokens)
            rows.append(torch.as_tensor(activations(document, tokens), dtype=torch.float32).view(len(tokens), -1))
        n = len(ids) // LENGTH * LENGTH
        self.tokens, self.owner = (torch.tensor(side[:n]).view(-1, LENGTH) for side in (ids, owner))
        self.counted = torch.ones_like(self.tokens, dtype=torch.bool)
        self.counted[:, :2] = False
        self.dense = torch.cat(rows)[:n] * self.counted.flatten()[:, None]
        self.contexts = contexts

    def codes(self) -> Iterator[tuple[Codes, dict[str, torch.Tensor]]]:
        for begin in range(0, len(self.tokens), self.contexts):
            part = slice(begin, begin + self.contexts)
            entry = {"tokens": self.tokens[part].int(), "counted": self.counted[part], "owner": self.owner[part]}
            dense = self.dense.view(len(self.tokens), LENGTH, -1)[part][self.counted[part]]
            yield Codes.from_dense(dense), entry

"""Text with planted words, suffixes and topics, as passages of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.step import Codes

STEMS = ["walk", "jump", "talk", "paint", "plant", "count", "sort", "pack", "turn", "fold", "print", "start", "lift", "point"]
SUFFIXES = ("", "ing", "ed", "ly", "able")
# Words that come together in a document on their topic.
TOPICS = (
    ["river", "boat", "sail", "harbour", "anchor", "tide"],
    ["flour", "oven", "bread", "butter", "sugar", "dough"],
    ["tensor", "matrix", "vector", "kernel", "gradient", "axis"],
    ["violin", "cello", "flute", "opera", "chorus", "tempo"],
)
LETTERS = "abcdefghij"


def documents(count: int = 400, seed: int = 0) -> list[str]:
    """Documents of 60 words: common words, words with suffixes, and in half of them the words of one topic."""
    generator = np.random.default_rng(seed)
    common = [f"{a}{b}{c}o" for a in LETTERS for b in "aeiou" for c in LETTERS[:4]]
    texts: list[str] = []
    for _ in range(count):
        words = generator.choice(common, 40).tolist()
        words += [stem + str(generator.choice(SUFFIXES)) for stem in generator.choice(STEMS, 10).tolist()]
        topic = int(generator.integers(2 * len(TOPICS)))
        words += generator.choice(TOPICS[topic] if topic < len(TOPICS) else common, 10).tolist()
        texts.append(" ".join(generator.permutation(words).tolist()))
    return texts


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose entries are most of the words, and parts of the others."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(documents(), trainers.BpeTrainer(vocab_size=700, special_tokens=["<eos>"], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


@dataclass(frozen=True)
class TextOnly:
    """The documents as passages of tokens, on which no latent fires."""

    passages: list[Entry]

    @classmethod
    def of(cls, texts: list[str], context: int = 64) -> "TextOnly":
        """Some documents, each followed by the end of text, in contexts of equal length."""
        encode: Any = tokenizer()
        ids = [encode(text)["input_ids"] + [encode.eos_token_id] for text in texts]
        tokens = torch.tensor([token for one in ids for token in one])
        owner = torch.repeat_interleave(torch.tensor([len(one) for one in ids]))
        length = len(tokens) // context * context
        tokens, owner = tokens[:length].view(-1, context).int(), owner[:length].view(-1, context)
        return cls([{"tokens": tokens, "owner": owner, "counted": tokens != encode.eos_token_id}])

    def codes(self) -> Iterator[tuple[Codes, Entry]]:
        """Empty codes of each passage, with its entry."""
        for entry in self.passages:
            nothing = torch.zeros(0, dtype=torch.long)
            yield Codes(nothing, nothing, torch.zeros(0), (int(entry["counted"].sum()), 1)), entry

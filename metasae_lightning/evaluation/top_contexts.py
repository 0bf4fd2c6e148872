"""Text around the tokens where latents fire most."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.strongest_hits import strongest_hits

BEFORE, AFTER = 12, 6
# A tokenizer's text of a token that holds a part of a character.
PART = "\ufffd"


@dataclass(frozen=True)
class Context:
    """Tokens of a document around one that a latent fires on."""

    document: int
    """Document id."""
    at: int
    """Index in `tokens` of the token that the latent fires on."""
    tokens: list[str]
    """Texts of the tokens; a character that spans several tokens stands in the last."""
    values: list[float]
    """Activation of the latent on each token."""

    @property
    def marked(self) -> str:
        """One line of text, with the token that the latent fires on between « and »."""
        before, token, after = ("".join(part) for part in (self.tokens[: self.at], [self.tokens[self.at]], self.tokens[self.at + 1 :]))
        return " ".join(f"{before}«{token}»{after}".split())


def top_contexts(
    collected: CollectedCodes, latents: Sequence[int] | set[int], tokenizer: Any, *, count: int = 3
) -> dict[int, list[Context]]:
    """For each latent, the text around its strongest firing in each of its `count` best documents."""
    contexts: dict[int, list[Context]] = {latent: [] for latent in sorted(set(latents))}
    chosen = torch.zeros(len(collected.subject.W_dec), dtype=torch.bool)
    chosen[list(contexts)] = True
    hits, spelling = strongest_hits(collected, chosen, count), Spelling(tokenizer)
    context_of_hit: dict[int, Context] = {}
    for number, (codes, entry) in enumerate(collected.codes() if len(hits.values) else ()):
        in_passage = np.flatnonzero(hits.places[:, 2] == number)
        if not len(in_passage):
            continue
        owner, tokens = entry["owner"].flatten().numpy(), entry["tokens"].flatten().numpy()
        window = hits.places[in_passage, 3, None] + np.arange(-BEFORE, AFTER + 1)
        inside = (window >= 0) & (window < len(owner))
        window = window.clip(0, len(owner) - 1)
        # A window ends at the borders of its context and of its document.
        length, at = entry["owner"].shape[1], hits.places[in_passage, 3, None]
        inside &= (window // length == at // length) & (owner[window] == owner[at])
        row = np.cumsum(entry["counted"].flatten().numpy()) - 1
        acts = sparse.csr_matrix((codes.values.numpy(), (codes.rows.numpy(), codes.latents.numpy())), shape=codes.shape)
        latent = np.broadcast_to(hits.places[in_passage, 0, None], window.shape)
        fired = np.asarray(acts[row[window].clip(0).ravel(), latent.ravel()]).reshape(window.shape)
        fired = fired * entry["counted"].flatten().numpy()[window]
        for hit, positions, within, value in zip(in_passage.tolist(), window, inside, fired, strict=True):
            texts = spelling.token_texts(tokens[positions[within]].tolist())
            values = [float(f"{v:.3g}") for v in value[within].tolist()]
            context_of_hit[hit] = Context(int(hits.places[hit, 1]), int(within[:BEFORE].sum()), texts, values)
    for hit, context in sorted(context_of_hit.items()):
        contexts[int(hits.places[hit, 0])].append(context)
    return contexts


class Spelling:
    """Texts of tokens inside a text: a space at the start of a token stays, and a special token is its name."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Some tokenizers drop the space that a text begins with.
        self._before = tokenizer("x", add_special_tokens=False)["input_ids"][-1:]
        self.special = frozenset[int](tokenizer.all_special_ids)
        # Some tokenizers decode a special token to nothing.
        self._known: dict[int, str] = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in self.special}

    def token_texts(self, tokens: list[int]) -> list[str]:
        """The text of each token of a sequence; a character that spans several tokens stands in the last of them."""
        alone = [self._single(token) for token in tokens]
        if not any(PART in text for text in alone):
            return alone
        texts = list[str]()
        for is_special, run in itertools.groupby(tokens, self.special.__contains__):
            part = list(run)
            texts += [self._single(token) for token in part] if is_special else self._whole_characters(part)
        return texts

    def _whole_characters(self, tokens: list[int]) -> list[str]:
        texts = [self._text(tokens[:end]) for end in range(len(tokens) + 1)]
        complete = [text.rstrip(PART) for text in texts]
        # Each token adds the characters that it completes; the last one also shows what never became complete.
        return [after[len(before) :] for before, after in zip(complete, [*complete[1:-1], texts[-1]], strict=False)]

    def _single(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text([token])
        return self._known[token]

    def _text(self, tokens: list[int]) -> str:
        def decoded(ids: list[int]) -> str:
            return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

        return decoded([*self._before, *tokens])[len(decoded(self._before)) :]

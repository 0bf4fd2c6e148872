"""Text around the tokens where latents fire most."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import sparse
from torch import Tensor

from metasae_lightning.evaluation.collect import CollectedCodes

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
        """One line of text, the token between « and »."""
        before, token, after = ("".join(part) for part in (self.tokens[: self.at], [self.tokens[self.at]], self.tokens[self.at + 1 :]))
        return " ".join(f"{before}«{token}»{after}".split())


@dataclass(frozen=True)
class Hits:
    """Firings: tokens on which latents are active."""

    values: Float[np.ndarray, " hit"]
    """Activation of each firing."""
    places: Int[np.ndarray, "hit 4"]
    """Latent, document, passage, and position in the passage of each firing."""

    def best(self, count: int) -> "Hits":
        """The strongest firing in each of the `count` best documents of each latent, sorted by latent, strongest first."""
        latent, document = self.places[:, 0], self.places[:, 1]
        order = np.lexsort((-self.values, document, latent))
        latent, document = latent[order], document[order]
        first = np.append(True, (np.diff(latent) != 0) | (np.diff(document) != 0))[: len(order)]
        order = order[first]
        order = order[np.lexsort((-self.values[order], self.places[order, 0]))]
        kept = order[rank_in_group(self.places[order, 0]) < count]
        return Hits(self.values[kept], self.places[kept])


def rank_in_group(groups: Int[np.ndarray, " item"]) -> Int[np.ndarray, " item"]:
    """Index of each item within its group; the items of a group are adjacent.

    >>> rank_in_group(np.array([3, 3, 3, 5, 7, 7])).tolist()
    [0, 1, 2, 0, 0, 1]
    """
    starts = np.append(True, np.diff(groups) != 0)[: len(groups)]
    places = np.arange(len(groups))
    return places - np.maximum.accumulate(np.where(starts, places, 0))


def strongest_hits(seen: CollectedCodes, chosen: Bool[Tensor, " d_sae"], count: int) -> Hits:
    """The strongest firings of the chosen latents, in `count` documents each."""
    kept = Hits(np.zeros(0, np.float32), np.zeros((0, 4), np.int64))
    least = torch.zeros(len(chosen))
    for number, (codes, piece) in enumerate(seen.codes()):
        # Once a latent has `count` documents, only stronger firings matter.
        found = (chosen[codes.latents] & (codes.values > least[codes.latents])).nonzero().flatten()
        place = piece["counted"].flatten().nonzero().flatten()[codes.rows[found]]
        document = piece["owner"].flatten()[place]
        places = torch.stack([codes.latents[found], document, torch.full_like(place, number), place], 1).numpy()
        values = np.concatenate([kept.values, codes.values[found].numpy()])
        kept = Hits(values, np.concatenate([kept.places, places])).best(count)
        full = np.flatnonzero(rank_in_group(kept.places[:, 0]) == count - 1)
        least[kept.places[full, 0]] = torch.from_numpy(kept.values[full])
    return kept


def top_contexts(seen: CollectedCodes, latents: Sequence[int] | set[int], tokenizer: Any, *, count: int = 3) -> dict[int, list[Context]]:
    """For each latent, the text around its strongest firing in each of its `count` best documents."""
    found: dict[int, list[Context]] = {latent: [] for latent in sorted(set(latents))}
    chosen = torch.zeros(len(seen.subject.W_dec), dtype=torch.bool)
    chosen[list(found)] = True
    hits, spelling = strongest_hits(seen, chosen, count), Spelling(tokenizer)
    made: dict[int, Context] = {}
    for number, (codes, piece) in enumerate(seen.codes() if len(hits.values) else ()):
        own = np.flatnonzero(hits.places[:, 2] == number)
        if not len(own):
            continue
        owner, tokens = piece["owner"].flatten().numpy(), piece["tokens"].flatten().numpy()
        window = hits.places[own, 3, None] + np.arange(-BEFORE, AFTER + 1)
        inside = (window >= 0) & (window < len(owner))
        window = window.clip(0, len(owner) - 1)
        # Neither another context's tokens nor another document's.
        length, at = piece["owner"].shape[1], hits.places[own, 3, None]
        inside &= (window // length == at // length) & (owner[window] == owner[at])
        row = np.cumsum(piece["counted"].flatten().numpy()) - 1
        acts = sparse.csr_matrix((codes.values.numpy(), (codes.rows.numpy(), codes.latents.numpy())), shape=codes.shape)
        latent = np.broadcast_to(hits.places[own, 0, None], window.shape)
        fired = np.asarray(acts[row[window].clip(0).ravel(), latent.ravel()]).reshape(window.shape)
        fired = fired * piece["counted"].flatten().numpy()[window]
        for hit, places, whole, value in zip(own.tolist(), window, inside, fired, strict=True):
            said = spelling.pieces(tokens[places[whole]].tolist())
            values = [float(f"{v:.3g}") for v in value[whole].tolist()]
            made[hit] = Context(int(hits.places[hit, 1]), int(whole[:BEFORE].sum()), said, values)
    for hit, context in sorted(made.items()):
        found[int(hits.places[hit, 0])].append(context)
    return found


class Spelling:
    """Texts of tokens as they appear inside a text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Some tokenizers drop the space that a text begins with.
        self._before = tokenizer("x", add_special_tokens=False)["input_ids"][-1:]
        self._known: dict[int, str] = {}

    def pieces(self, tokens: list[int]) -> list[str]:
        """The text of each of some consecutive tokens."""
        alone = [self._alone(token) for token in tokens]
        if not any(PART in piece for piece in alone):
            return alone
        texts = [self._text(tokens[:end]) for end in range(len(tokens) + 1)]
        whole = [text.rstrip(PART) for text in texts]
        # Each token adds the characters that it completes; the last one also shows what never became complete.
        return [after[len(before) :] for before, after in zip(whole, [*whole[1:-1], texts[-1]], strict=False)]

    def _alone(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._text([token])
        return self._known[token]

    def _text(self, tokens: list[int]) -> str:
        def decoded(of: list[int]) -> str:
            return self._tokenizer.decode(of, clean_up_tokenization_spaces=False)

        return decoded([*self._before, *tokens])[len(decoded(self._before)) :]


def latents_record(seen: CollectedCodes, tokenizer: Any | None, *, count: int = 3) -> dict[str, Any]:
    """For every latent: number of firings, largest activation, and top contexts."""
    width = len(seen.subject.W_dec)
    firings, maximum = torch.zeros(width, dtype=torch.long), torch.zeros(width)
    for codes, _ in seen.codes():
        firings += codes.firings().cpu()
        maximum = maximum.scatter_reduce(0, codes.latents, codes.values, "amax")
    live = firings.nonzero().flatten().tolist()
    contexts = top_contexts(seen, live, tokenizer, count=count) if tokenizer is not None and count else {}
    return {
        **{"weights": seen.subject.cache_key["sae"], "tokens": int(seen.reconstruction.tokens)},
        **{"firings": firings.tolist(), "maximum": [float(f"{value:.4g}") for value in maximum.tolist()]},
        "contexts": {str(latent): [asdict(context) for context in contexts[latent]] for latent in sorted(contexts)},
    }

"""Where latents fire most: text with the token marked."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from metasae_lightning.observation import Observation

BEFORE, AFTER = 12, 6


def top_contexts(seen: Observation, latents: Iterable[int], tokenizer: Any, *, count: int = 3) -> dict[int, list[dict[str, Any]]]:
    """For each of some latents the `count` documents in which it fires most: the text around the token, the token between « and »."""
    wanted = sorted(set(latents))
    found: dict[int, list[dict[str, Any]]] = {latent: [] for latent in wanted}
    if not wanted:
        return found
    chosen = torch.zeros(len(seen.subject.W_dec), dtype=torch.bool)
    chosen[wanted] = True
    for codes, piece in seen.codes():
        hits = chosen[codes.latents].nonzero().flatten()
        places = piece["counted"].nonzero()
        for latent in codes.latents[hits].unique().tolist():
            own = hits[codes.latents[hits] == latent]
            # More than are wanted, since several may be of one document.
            for at in own[codes.values[own].topk(min(4 * count, len(own))).indices].tolist():
                context, position = places[codes.rows[at]].tolist()
                document = int(piece["owner"][context, position])
                found[latent].append(
                    {"value": codes.values[at].item(), "document": document, "tokens": piece["tokens"][context], "at": position}
                )
        found = {latent: best(hits, count) for latent, hits in found.items()}
    return {latent: [told(hit, tokenizer) for hit in hits] for latent, hits in found.items()}


def best(hits: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The largest, a document each."""
    first: dict[int, dict[str, Any]] = {}
    for hit in sorted(hits, key=lambda hit: -hit["value"]):
        first.setdefault(hit["document"], hit)
    return list(first.values())[:count]


def told(hit: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A hit as text."""
    tokens, at = hit["tokens"], hit["at"]

    def text(part: Tensor) -> str:
        return tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False)

    before, after = text(tokens[max(0, at - BEFORE) : at]), text(tokens[at + 1 : at + 1 + AFTER])
    return {"value": round(hit["value"], 4), "text": " ".join(f"{before}«{text(tokens[at : at + 1])}»{after}".split())}

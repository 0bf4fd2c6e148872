"""Latents of the first arm that another arm splits, with contexts and explanations of each latent and of its parts."""

from collections.abc import Sequence
from typing import Any

from metasae_lightning.evaluation.compare import best_matches, firings, splits
from metasae_lightning.judging.arms import SampledArm
from metasae_lightning.judging.explanations import Explainer
from metasae_lightning.judging.texts.contexts import Context, LatentContexts
from metasae_lightning.judging.texts.draw import draw_contexts
from metasae_lightning.judging.texts.windows import ContextSettings

# Contexts of a split latent, and of each of its parts.
SHOWN = 5
# Memory for counting co-firings, in GiB.
PAIRS_GIB = 0.5


def split_records(first: SampledArm, other: SampledArm, explainer: Explainer, *, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` latents of the first arm that another arm splits, as `evaluation.compare.splits` finds them, with contexts.

    A split is left out if one of its latents has too few contexts.
    """
    if not count:
        return []
    codes, firings_other = (first.collected, other.collected), firings(other.collected)
    forward, _ = best_matches(firings(first.collected), firings_other, PAIRS_GIB)
    found = splits(forward, firings_other)
    wanted = [entry["latent"] for entry in found], [latent for entry in found for latent in entry["into"]]
    settings = ContextSettings(explaining=SHOWN, scoring=1, silent=1, near=0, seed=seed)
    drawn: list[dict[int, LatentContexts]] = []
    for side, latents in zip(codes, wanted, strict=True):
        distinct = list(dict.fromkeys(latents))
        contexts = draw_contexts(side, distinct, text=explainer.text, W_dec=side.subject.W_dec.cpu(), settings=settings).latents
        drawn.append({one.latent: one for one in contexts})
    usable = [entry for entry in found if entry["latent"] in drawn[0] and all(latent in drawn[1] for latent in entry["into"])][:count]
    whole = explainer.explanations({entry["latent"]: drawn[0][entry["latent"]] for entry in usable})
    parts = explainer.explanations({latent: drawn[1][latent] for entry in usable for latent in entry["into"]})
    return [
        {
            **entry,
            "explanations": {"latent": whole.get(entry["latent"], ""), "into": [parts.get(latent, "") for latent in entry["into"]]},
            "contexts": {
                "latent": shown(drawn[0][entry["latent"]].explaining),
                "into": [shown(drawn[1][latent].explaining) for latent in entry["into"]],
            },
        }
        for entry in usable
    ]


def shown(contexts: Sequence[Context]) -> list[dict[str, Any]]:
    """Contexts as JSON values: texts of the tokens, their activations, and the index of the token with the largest."""
    return [
        {
            "tokens": list(context.tokens),
            "values": [float(f"{value:.3g}") for value in context.activations],
            "at": context.activations.index(context.peak),
        }
        for context in contexts
    ]

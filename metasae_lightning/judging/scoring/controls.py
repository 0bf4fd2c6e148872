"""Controls: contexts and explanations that do not belong together, scored by the same code. A perfect judge is at chance."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from metasae_lightning.errors import InputError
from metasae_lightning.judging.texts.contexts import LatentContexts

T = TypeVar("T")
# Random cycles that are tried. The one in which the fewest latents get an explanation equal to their own is used.
TRIES = 100


def other_explanation(explanations: Mapping[int, str], seed: int) -> dict[int, str]:
    """Each latent with the explanation of another latent, drawn at random; each explanation is used once.

    A perfect judge finds the concept of another latent equally often in contexts of either kind, so it is at chance. It is above chance as
    far as the two latents fire in the same contexts. Of `TRIES` random draws, the one in which the fewest latents get an explanation equal
    to their own is used.

    >>> sorted(other_explanation({3: "cats", 5: "dogs"}, seed=0).items())
    [(3, 'dogs'), (5, 'cats')]
    """
    partner = cycle_of(explanations, seed)
    return {latent: explanations[partner[latent]] for latent in explanations}


def cycle_of(explanations: Mapping[int, str], seed: int) -> dict[int, int]:
    """Another latent for each latent, by the random cycle that gives the fewest latents an explanation equal to their own."""
    rng = np.random.default_rng([seed, 0])
    cycles = [random_cycle(list(explanations), rng) for _ in range(TRIES)]
    return min(cycles, key=lambda partner: sum(explanations[latent] == explanations[partner[latent]] for latent in partner))


def random_cycle(latents: Sequence[int], rng: np.random.Generator) -> dict[int, int]:
    """Another latent for each latent: the next in a random cycle through all of them. A single latent is an `InputError`."""
    if len(latents) < 2:
        raise InputError(f"latents: a control needs two at least, got {len(latents)}")
    cycle = _permuted(latents, rng)
    return dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))


def shuffled_contexts(contexts: Mapping[int, LatentContexts], seed: int) -> dict[int, LatentContexts]:
    """Each latent with contexts in which random other latents fire, in place of those in which it fires; all else is its own.

    A context keeps the activations of the latent that fires in it. The other latents give one context each in turn, so that few are from
    the same latent. No context is from a document of the latent's own firing contexts, because the latent may fire there.

    A perfect judge finds the latent's concept in neither kind of context, so it is at chance. It is above chance as far as the latent fires
    in contexts of others, as one that fires nearly everywhere does. In `intruder`, five contexts of different latents have no intruder.
    A judge that is above chance for another reason tells the two kinds of context apart by something else than the concept.
    """
    if len(contexts) < 2:
        raise InputError(f"latents: a control needs two at least, got {len(contexts)}")
    return {latent: _with_contexts_of_others(own, contexts, np.random.default_rng([seed, 1, latent])) for latent, own in contexts.items()}


def _with_contexts_of_others(own: LatentContexts, contexts: Mapping[int, LatentContexts], rng: np.random.Generator) -> LatentContexts:
    """The latent with contexts of other latents in place of its firing ones: as many, or fewer if the others have too few."""
    documents = {context.document for context in [*own.explaining, *own.firing]}
    others = [latent for latent in contexts if latent != own.latent]
    supplies = [
        [context for context in _permuted(contexts[latent].firing, rng) if context.document not in documents]
        for latent in _permuted(others, rng)
    ]
    longest = max(map(len, supplies))
    in_turns = [supply[turn] for turn in range(longest) for supply in supplies if turn < len(supply)]
    drawn = in_turns[: len(own.firing)]
    return replace(own, firing=sorted(drawn, key=lambda context: -context.peak))


def _permuted(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    """The items in random order."""
    return [items[index] for index in rng.permutation(len(items)).tolist()]

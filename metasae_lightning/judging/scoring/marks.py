"""Contexts as a question shows them: unchanged, with marked tokens, or with replaced tokens."""

from collections.abc import Sequence

import numpy as np

from metasae_lightning.judging.judges.questions import ShownText
from metasae_lightning.judging.texts.contexts import Context

# Delphi's share: a token counts as firing if its activation is at least this share of the largest in the context.
FIRING_SHARE = 0.3


def plain(context: Context) -> ShownText:
    """The context without marks."""
    return ShownText(context.tokens, (False,) * len(context.tokens))


def with_firing_marked(context: Context) -> ShownText:
    """The context with the tokens marked that the latent fires on."""
    return ShownText(context.tokens, firing_mask(context.activations))


def with_nearest_marked(context: Context) -> ShownText:
    """The context with the tokens marked that the latent with the nearest decoder row fires on."""
    return ShownText(context.tokens, firing_mask(context.nearest_activations))


def with_marks_of(context: Context, other: Context) -> ShownText:
    """The context with tokens marked at the places, counted from the end, where `other` has tokens that its latent fires on.

    So marks in both kinds of texts are as many and stand alike. If the context is too short for any of them, its first token is marked.

    >>> with_marks_of(Context(0, ("a", "b", "c"), (0.0,) * 3), Context(1, ("x", "y", "z", "w"), (0.0, 0.0, 5.0, 0.0))).marked
    (False, True, False)
    """
    length = len(context.tokens)
    marks = firing_mask(other.activations)[-length:]
    marked = (False,) * (length - len(marks)) + marks
    return ShownText(context.tokens, marked if any(marked) else (True, *marked[1:]))


def with_firing_replaced(context: Context, other_tokens: Sequence[str], rng: np.random.Generator) -> ShownText | None:
    """The context with a random one of `other_tokens` in place of each token that the latent fires on.

    A token that equals, apart from spaces, one that the latent fires on here is not used. None if no other token is left.
    """
    fires = firing_mask(context.activations)
    words = {token.strip() for token, is_firing in zip(context.tokens, fires, strict=True) if is_firing}
    candidates = [token for token in other_tokens if token.strip() not in words]
    if not candidates:
        return None
    drawn = rng.integers(len(candidates), size=len(fires)).tolist()
    tokens = [candidates[index] if fire else token for token, fire, index in zip(context.tokens, fires, drawn, strict=True)]
    return ShownText(tuple(tokens), (False,) * len(tokens))


def firing_mask(activations: Sequence[float]) -> tuple[bool, ...]:
    """Whether a latent's activation on each token of a context is at least `FIRING_SHARE` of the largest there.

    >>> firing_mask((0.0, 10.0, 3.0, 2.9))
    (False, True, True, False)
    """
    peak = max(activations, default=0.0)
    return tuple(activation > 0 and activation >= FIRING_SHARE * peak for activation in activations)

"""Scores from sentence embeddings: whether the contexts of a latent are near each other, or near its explanation."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from metasae_lightning.judging.scoring.formulas import auc
from metasae_lightning.judging.texts.contexts import LatentContexts

# Embeddings of texts, of unit length, one row a text.
Embed = Callable[[Sequence[str]], Float[Tensor, "text width"]]


class EmbeddingScore(ABC):
    """A score by how near a latent's contexts are to reference texts.

    It is the probability that a context in which the latent fires is nearer to the reference than a random one in which it does not.
    Nearness is the mean cosine with the reference texts. NaN without reference texts, firing contexts or silent contexts.
    """

    name: str
    """Name in tables."""
    description: str
    """The formula, in one line."""
    chance: float = 0.5
    """Value for contexts that are unrelated to the reference."""
    needs_explanation: bool
    """Whether the reference is the explanation."""

    def value(self, contexts: LatentContexts, explanation: str, embed: Embed) -> float:
        """The score of a latent."""
        reference = self.reference(contexts, explanation)
        if not reference or not contexts.firing or not contexts.silent:
            return float("nan")
        kinds = (reference, [context.text for context in contexts.firing], [context.text for context in contexts.silent])
        rows = embed([text for texts in kinds for text in texts])
        of_reference, firing, silent = rows.split([len(texts) for texts in kinds])
        direction = of_reference.mean(0)
        return auc((firing @ direction).tolist(), (silent @ direction).tolist())

    @abstractmethod
    def reference(self, contexts: LatentContexts, explanation: str) -> list[str]:
        """The reference texts; empty if there are none."""


@final
class TopicalCoherence(EmbeddingScore):
    """Are a latent's contexts near each other? The reference texts are its contexts for the explanation, from other documents."""

    name = "topical_coherence"
    description = "Probability that a text in which the latent fires is nearer to its other texts than a random text is (embeddings)."
    needs_explanation = False

    def reference(self, contexts: LatentContexts, explanation: str) -> list[str]:
        return [context.text for context in contexts.explaining]


@final
class ExplanationNearness(EmbeddingScore):
    """Are a latent's contexts near its explanation? The only reference text is the explanation."""

    name = "explanation_nearness"
    description = "Probability that a text in which the latent fires is nearer to its explanation than a random text is (embeddings)."
    needs_explanation = True

    def reference(self, contexts: LatentContexts, explanation: str) -> list[str]:
        return [explanation] if explanation else []

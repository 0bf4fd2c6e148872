"""Settings of an evaluation. Imports nothing heavy: the command line builds its options from this class."""

from dataclasses import dataclass
from typing import Literal

from metasae_lightning.errors import InputError


@dataclass(frozen=True)
class Settings:
    """Measures of an evaluation and the amount of data for each.

    Args:
        tokens: Held-out tokens to evaluate on. Default: `test_tokens` of the data's recipe.
        rule: Rule for thresholds: `stored` leaves them as they are; `global`, `rate` and `eer` recalibrate them on validation tokens.
            Default: `rate` for several SAEs, `stored` for one.
        l0: Target number of active latents per token for recalibrated thresholds. Default: the training L0 of an SAE without
            thresholds, else the smallest training L0.
        calibration_tokens: Validation tokens to recalibrate thresholds on.
        splice_tokens: Predicted tokens to measure the language model's loss on, with the reconstruction spliced in; 0 skips this.
        critic_seeds: Number of fresh meta SAEs (critics) trained on the decoder and on each null; 0 skips this.
        critic_steps: Training steps of each critic.
        cuda_graph: On a GPU, train critics by a CUDA graph: the same critics in less time.
        by_polarity: Count each sign of a latent as a latent of its own, for SAEs with signed activations.
        contexts: Top documents to store for each latent, beside seven firings by quantile of activation; 0 stores no text.
        resamples: Bootstrap resamples of documents for intervals, and permutations of documents for p values.
        pairs_gib: Memory for counting pairs of latents, in GiB, beside the firings.
        seed: Seed of the bootstrap and of the permutations.
    """

    tokens: int | None = None
    rule: Literal["stored", "global", "rate", "eer"] | None = None
    l0: float | None = None
    calibration_tokens: int = 65_536
    splice_tokens: int = 8_192
    critic_seeds: int = 3
    critic_steps: int = 1500
    cuda_graph: bool = True
    by_polarity: bool = False
    contexts: int = 3
    resamples: int = 1000
    pairs_gib: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        minima = {"calibration_tokens": 1, "splice_tokens": 0, "critic_seeds": 0, "critic_steps": 1, "contexts": 0, "resamples": 1}
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens must be at least 1, got {self.tokens}")
        for name in ("l0", "pairs_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be more than 0, got {value}")

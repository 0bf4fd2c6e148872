"""What an evaluation measures, and on how much. Imports nothing heavy: the command line builds its options from this class."""

from dataclasses import dataclass
from typing import Literal

from metasae_lightning.errors import InputError


@dataclass(frozen=True)
class Settings:
    """What is measured, and on how much.

    Args:
        tokens: Held-out tokens; none is what the data's recipe tests on.
        rule: Thresholds: as `stored`, or set anew on validation tokens by `global`, `rate` or `eer`; none is `rate` where several are
            compared, and `stored` for one alone.
        l0: Latents active on a token that the rules aim at; none is that of an SAE without thresholds, or the least of all.
        calibration_tokens: Validation tokens that rules see.
        splice_tokens: Predicted tokens with the reconstruction in the model; 0 leaves that out.
        critic_seeds: Fresh critics on the decoder and on each null; 0 leaves them out.
        critic_steps: Steps of each.
        contexts: Documents kept of each latent, those in which it fires most; 0 leaves them out.
        resamples: Resamples of documents that intervals come from.
        memory_gib: What counting pairs may take beside the firings.
        seed: Seed of the resamples.
    """

    tokens: int | None = None
    rule: Literal["stored", "global", "rate", "eer"] | None = None
    l0: float | None = None
    calibration_tokens: int = 65_536
    splice_tokens: int = 8_192
    critic_seeds: int = 3
    critic_steps: int = 1500
    contexts: int = 3
    resamples: int = 1000
    memory_gib: float = 2.0
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"calibration_tokens": 1, "splice_tokens": 0, "critic_seeds": 0, "critic_steps": 1, "contexts": 0, "resamples": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise InputError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"tokens must be at least 1, got {self.tokens}")
        for name in ("l0", "memory_gib"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"{name} must be more than 0, got {value}")

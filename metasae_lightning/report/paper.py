"""The paper's own numbers (arXiv 2604.03436), for ours to stand beside, and the doubts that they leave."""

from dataclasses import dataclass

SETTING = "GPT-2 large, blocks.20.hook_resid_pre, 20,480 latents, k 64, a meta SAE of 1,800, one seed"


@dataclass(frozen=True)
class Row:
    """What a weight and a sigma squared did, in percent of the solo SAE."""

    phi: float
    """Mean of |phi|."""
    error: float
    """Squared error."""
    loss: float | None = None
    """What the reconstruction adds to the model's loss, in percent of the loss: not a difference."""


# By weight (the paper's lambda2) and sigma squared.
ROWS: dict[tuple[float, float], Row] = {
    (0.1, 0.3): Row(-1.9, 2.0),
    (0.1, 1.0): Row(-3.8, 3.5, 2.8),
    (0.1, 3.0): Row(-3.5, 1.8, 2.7),
    (0.3, 0.3): Row(-1.5, 5.5),
    (0.3, 1.0): Row(-7.5, 9.3, 3.1),
    (0.3, 3.0): Row(-4.4, 5.7, 2.9),
    (1.0, 0.3): Row(3.8, 13.1),
    (1.0, 1.0): Row(2.8, 19.6, 3.5),
    (1.0, 3.0): Row(2.6, 13.5, 3.2),
}
# Of the solo SAE, between.
SOLO_LOSS = (2.4, 2.5)
# It calls this one best.
CHOSEN = (0.3, 1.0)

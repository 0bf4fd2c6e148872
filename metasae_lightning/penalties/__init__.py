"""Penalties on the primary's decoder that are added to its loss. Their formulas are in `functional`."""

from metasae_lightning.penalties.base import Critic, Penalty
from metasae_lightning.penalties.decomposability import Decomposability
from metasae_lightning.penalties.orthogonality import Orthogonality
from metasae_lightning.penalties.weighted_sum import Penalties, PenaltyLoss

__all__ = ["Critic", "Decomposability", "Orthogonality", "Penalties", "Penalty", "PenaltyLoss"]

"""All formulas, pure: tensors in, tensors out.

Dims: `batch` tokens, `d_in` width of an activation, `d_sae` latents of the primary SAE (its decoder's rows), `d_meta` latents of the
meta SAE, `feature` true features of planted data.
"""

from metasae_lightning.functional.cofiring import cofiring_bound, phi, phi_by_chance
from metasae_lightning.functional.firing import detection, equal_error_bin, share_above
from metasae_lightning.functional.geometry import nearest_cosines, spectrum, stable_ranks, unit_rows
from metasae_lightning.functional.interactions import pairwise_interactions
from metasae_lightning.functional.penalties import decomposability, decomposability_with_slope, orthogonality
from metasae_lightning.functional.predictions import cross_entropy, kl_divergence
from metasae_lightning.functional.reconstruction import agreement_sums, fvu, fvu_of_sums, geometric_median, reconstruction_sums

__all__ = [
    "agreement_sums",
    "cofiring_bound",
    "cross_entropy",
    "decomposability",
    "decomposability_with_slope",
    "detection",
    "equal_error_bin",
    "fvu",
    "fvu_of_sums",
    "geometric_median",
    "kl_divergence",
    "nearest_cosines",
    "orthogonality",
    "pairwise_interactions",
    "phi",
    "phi_by_chance",
    "reconstruction_sums",
    "share_above",
    "spectrum",
    "stable_ranks",
    "unit_rows",
]

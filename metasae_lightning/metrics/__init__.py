"""Torchmetrics. They hold state; the formulas are in `functional`."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.metrics.cofiring import Phi, PhiSample
    from metasae_lightning.metrics.dead_latents import DeadLatents
    from metasae_lightning.metrics.decoder import DecoderGeometry
    from metasae_lightning.metrics.decomposition import Decomposition
    from metasae_lightning.metrics.feature_recovery import FeatureRecovery
    from metasae_lightning.metrics.loss_recovered import Splice
    from metasae_lightning.metrics.reconstruction import Reconstruction

__all__ = ["DeadLatents", "DecoderGeometry", "Decomposition", "FeatureRecovery", "Phi", "PhiSample", "Reconstruction", "Splice"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["Phi", "PhiSample"], "metasae_lightning.metrics.cofiring"),
        "DeadLatents": "metasae_lightning.metrics.dead_latents",
        "DecoderGeometry": "metasae_lightning.metrics.decoder",
        "Decomposition": "metasae_lightning.metrics.decomposition",
        "FeatureRecovery": "metasae_lightning.metrics.feature_recovery",
        "Splice": "metasae_lightning.metrics.loss_recovered",
        "Reconstruction": "metasae_lightning.metrics.reconstruction",
    },
)

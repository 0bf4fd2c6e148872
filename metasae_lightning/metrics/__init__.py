"""Torchmetrics. They hold state; the formulas are in `functional`."""

from metasae_lightning.metrics.cofiring import Phi, PhiSample
from metasae_lightning.metrics.dead_latents import DeadLatents
from metasae_lightning.metrics.decoder import DecoderGeometry
from metasae_lightning.metrics.decomposition import Decomposition
from metasae_lightning.metrics.feature_recovery import FeatureRecovery
from metasae_lightning.metrics.loss_recovered import Splice
from metasae_lightning.metrics.reconstruction import Reconstruction

__all__ = ["DeadLatents", "DecoderGeometry", "Decomposition", "FeatureRecovery", "Phi", "PhiSample", "Reconstruction", "Splice"]

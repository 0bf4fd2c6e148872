"""Joint training of a sparse autoencoder and a meta SAE on its decoder, with SAELens in and out."""

from metasae_lightning.arms import SideBySide
from metasae_lightning.data import ActivationsDataModule
from metasae_lightning.joint import JointSAE
from metasae_lightning.planted import SyntheticDataModule

__all__ = ["ActivationsDataModule", "JointSAE", "SideBySide", "SyntheticDataModule"]

"""Joint training of a sparse autoencoder and a meta SAE on its decoder, with SAELens in and out."""

from metasae_lightning.data import ActivationsDataModule, SyntheticDataModule
from metasae_lightning.joint import JointSAE

__all__ = ["ActivationsDataModule", "JointSAE", "SyntheticDataModule"]

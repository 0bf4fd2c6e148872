"""Joint training of a sparse autoencoder and a meta SAE on its decoder, with SAELens in and out."""

from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.data.synthetic import SyntheticDataModule
from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.side_by_side import SideBySide

__all__ = ["ActivationsDataModule", "JointSAE", "SideBySide", "SyntheticDataModule"]

"""Activations of a language model, or of a synthetic one, as batches."""

from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.data.synthetic import SyntheticDataModule

__all__ = ["ActivationsDataModule", "SyntheticDataModule"]

"""Batches of activations, of a language model or of a synthetic one."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.data.datamodule import ActivationsDataModule
    from metasae_lightning.data.synthetic import SyntheticDataModule

__all__ = ["ActivationsDataModule", "SyntheticDataModule"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ActivationsDataModule": "metasae_lightning.data.datamodule",
        "SyntheticDataModule": "metasae_lightning.data.synthetic",
    },
)

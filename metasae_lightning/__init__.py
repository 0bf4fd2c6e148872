"""Joint training of a sparse autoencoder and a meta SAE on its decoder, with SAELens in and out."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.data.datamodule import ActivationsDataModule
    from metasae_lightning.data.synthetic import SyntheticDataModule
    from metasae_lightning.training.joint import JointSAE
    from metasae_lightning.training.side_by_side import SideBySide

__all__ = ["ActivationsDataModule", "JointSAE", "SideBySide", "SyntheticDataModule"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "ActivationsDataModule": "metasae_lightning.data.datamodule",
        "SyntheticDataModule": "metasae_lightning.data.synthetic",
        "JointSAE": "metasae_lightning.training.joint",
        "SideBySide": "metasae_lightning.training.side_by_side",
    },
)

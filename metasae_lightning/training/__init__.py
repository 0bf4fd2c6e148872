"""Lightning modules: the joint training of a primary SAE and a meta SAE, alone or as several arms."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.training.joint import JointSAE
    from metasae_lightning.training.side_by_side import SideBySide

__all__ = ["JointSAE", "SideBySide"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "JointSAE": "metasae_lightning.training.joint",
        "SideBySide": "metasae_lightning.training.side_by_side",
    },
)

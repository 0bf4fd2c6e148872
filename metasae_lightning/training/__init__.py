"""Lightning modules: the joint training of a primary SAE and a meta SAE, alone or as several arms."""

from metasae_lightning.training.joint import JointSAE
from metasae_lightning.training.side_by_side import SideBySide

__all__ = ["JointSAE", "SideBySide"]

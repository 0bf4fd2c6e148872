"""The public place of `Sharded`, which saved configs name."""

from metasae_lightning.training.strategy import Sharded

__all__ = ["Sharded"]

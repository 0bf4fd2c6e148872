"""`Sharded` under the name that saved configs use: `metasae_lightning.strategy.Sharded`."""

from metasae_lightning.training.strategy import Sharded

__all__ = ["Sharded"]

"""The command line `metasae`."""

from metasae_lightning.cli.entry import main

__all__ = ["main"]

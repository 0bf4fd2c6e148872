"""The command line `metasae`."""

from metasae_lightning.cli.lightning_cli import main

__all__ = ["main"]

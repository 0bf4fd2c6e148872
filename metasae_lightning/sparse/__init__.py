"""Exact work on the few latents that fire, where the dense way would touch them all."""

from metasae_lightning.sparse.kernels import Encoded, Rule, decode, encode, squared_error
from metasae_lightning.sparse.memory import LENT, Memory
from metasae_lightning.sparse.pattern import Pattern
from metasae_lightning.sparse.screening import Screen
from metasae_lightning.sparse.selection import among, largest

__all__ = ["LENT", "Encoded", "Memory", "Pattern", "Rule", "Screen", "among", "decode", "encode", "largest", "squared_error"]

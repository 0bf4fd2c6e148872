"""Matrices in pieces: across processes, in shards, in row chunks, sparse. Needs torch alone."""

from metasae_lightning.compute.buffers import LENT, Memory
from metasae_lightning.compute.encode_decode import Encoded, Rule, decode, encode, squared_error
from metasae_lightning.compute.sparse_matrix import Pattern
from metasae_lightning.compute.topk import among, largest
from metasae_lightning.compute.topk_incremental import Screen

__all__ = ["LENT", "Encoded", "Memory", "Pattern", "Rule", "Screen", "among", "decode", "encode", "largest", "squared_error"]

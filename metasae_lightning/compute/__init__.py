"""Matrices in pieces: across processes, in shards, in row chunks, sparse. Needs torch alone."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.compute.buffers import LENT, Memory
    from metasae_lightning.compute.encode_decode import Encoded, Rule, decode, encode, squared_error
    from metasae_lightning.compute.sparse_matrix import Pattern
    from metasae_lightning.compute.topk import among, largest
    from metasae_lightning.compute.topk_incremental import Screen

__all__ = ["LENT", "Encoded", "Memory", "Pattern", "Rule", "Screen", "among", "decode", "encode", "largest", "squared_error"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["LENT", "Memory"], "metasae_lightning.compute.buffers"),
        **dict.fromkeys(["Encoded", "Rule", "decode", "encode", "squared_error"], "metasae_lightning.compute.encode_decode"),
        "Pattern": "metasae_lightning.compute.sparse_matrix",
        **dict.fromkeys(["among", "largest"], "metasae_lightning.compute.topk"),
        "Screen": "metasae_lightning.compute.topk_incremental",
    },
)

"""Matrix computations: across processes, sharded, in row chunks, sparse. Imports no library but torch and jaxtyping."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.compute.buffers import SHARED, BufferPool
    from metasae_lightning.compute.encode_decode import Encoded, TopKRule, decode, encode, squared_error
    from metasae_lightning.compute.gpu.topk import CutFactor
    from metasae_lightning.compute.sparse_matrix import Pattern
    from metasae_lightning.compute.topk import largest_indices, topk_mask
    from metasae_lightning.compute.topk_incremental import IncrementalTopK

__all__ = [
    "SHARED",
    "BufferPool",
    "CutFactor",
    "Encoded",
    "IncrementalTopK",
    "Pattern",
    "TopKRule",
    "decode",
    "encode",
    "largest_indices",
    "squared_error",
    "topk_mask",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["SHARED", "BufferPool"], "metasae_lightning.compute.buffers"),
        **dict.fromkeys(["Encoded", "TopKRule", "decode", "encode", "squared_error"], "metasae_lightning.compute.encode_decode"),
        "CutFactor": "metasae_lightning.compute.gpu.topk",
        "Pattern": "metasae_lightning.compute.sparse_matrix",
        **dict.fromkeys(["topk_mask", "largest_indices"], "metasae_lightning.compute.topk"),
        "IncrementalTopK": "metasae_lightning.compute.topk_incremental",
    },
)

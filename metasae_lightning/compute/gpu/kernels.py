"""Triton's kernels by the names of the passes in `torch_forms`, and those that have no form in torch."""

from metasae_lightning.compute.gpu.row_kernels import decomposability, remove_radial, unit_rows
from metasae_lightning.compute.gpu.select_kernels import compact
from metasae_lightning.compute.gpu.sparse_kernels import product, product_and_sums, reconstruction_error, sampled

__all__ = ["compact", "decomposability", "product", "product_and_sums", "reconstruction_error", "remove_radial", "sampled", "unit_rows"]

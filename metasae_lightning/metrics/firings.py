"""Firings of latents on tokens, and exact counts of the tokens on which two latents fire together."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import Tensor

from metasae_lightning.compute.row_chunks import is_blocked

# Bytes per pair while counting: SciPy's index and count, our count, phi and its terms.
PAIR_BYTES = 64
# Bytes per firing: as received, concatenated, and in two CSR matrices of an index and a one.
FIRING_BYTES = 24
# Elements of the dense matrices of ones and zeros that a GPU multiplies.
DENSE_ELEMENTS = 2**28
# Sums of ones in float32 are exact up to this number of tokens.
EXACT_TOKENS = 2**24


class Firings(ABC):
    """A matrix of firings, tokens by latents: which latents are active on which tokens."""

    @staticmethod
    def of(latents: Int[Tensor, " nnz"], lengths: Int[Tensor, " token"], d_sae: int) -> "Firings":
        """The firings of `latents`, the active latents of all tokens in token order; each token has `lengths` of them.

        On a CPU they are a sparse matrix; on a GPU they are indices on that GPU.
        """
        if is_blocked(latents):
            pointers = np.concatenate([[0], np.cumsum(lengths.numpy(), dtype=np.int64)])
            # A count is at most the number of tokens, so 32 bits suffice for 2 billion tokens.
            ones = np.ones(len(latents), dtype=np.int32 if len(lengths) < 2**31 else np.int64)
            return SparseFirings(sparse.csr_matrix((ones, latents.numpy(), pointers), shape=(len(lengths), d_sae)))
        rows = torch.repeat_interleave(lengths.long(), output_size=len(latents))
        return DeviceFirings(rows, latents.long(), (len(lengths), d_sae))

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Number of tokens and of latents."""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.shape[0]

    @property
    @abstractmethod
    def counts(self) -> Float[Tensor, " d_sae"]:
        """Number of tokens that each latent fired on."""

    @abstractmethod
    def cofirings(self, other: Any, rows: int) -> Iterator[tuple[int, Float[Tensor, "row other"]]]:
        """Yield, for `rows` latents at a time, the index of the first and their co-firing counts with the latents of `other`.

        `other` has the firings on the same tokens, in the same kind of matrix.
        """

    @abstractmethod
    def pair_cofirings(self, left: Sequence[int], right: Sequence[int]) -> Float[Tensor, " pair"]:
        """Co-firing counts of some pairs of latents, on the CPU."""

    @abstractmethod
    def shifted(self, tokens: int) -> "Firings":
        """The same firings, each `tokens` tokens later; those of the last tokens come first."""


@final
@dataclass(frozen=True)
class SparseFirings(Firings):
    """Firings in a sparse matrix on a CPU: 8 bytes per firing and 4 per token below 2^31 firings."""

    matrix: Any
    """Ones in a SciPy CSR matrix, tokens by latents."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tokens and of latents."""
        return self.matrix.shape

    @property
    def counts(self) -> Float[Tensor, " d_sae"]:
        """Number of tokens that each latent fired on."""
        return torch.from_numpy(np.bincount(self.matrix.indices, minlength=self.matrix.shape[1])).double()

    def cofirings(self, other: "SparseFirings", rows: int) -> Iterator[tuple[int, Float[Tensor, "row other"]]]:
        """Yield the first latent and the counts of each tile, from products of sparse matrices."""
        by_latent = self.matrix.T.tocsr()
        for start in range(0, self.matrix.shape[1], rows):
            yield start, torch.from_numpy((by_latent[start : start + rows] @ other.matrix).toarray()).double()

    def pair_cofirings(self, left: Sequence[int], right: Sequence[int]) -> Float[Tensor, " pair"]:
        """Co-firing counts of some pairs of latents, from columns of the matrix."""
        columns = self.matrix.tocsc()
        sums = columns[:, list(left)].multiply(columns[:, list(right)]).sum(0)
        return torch.from_numpy(np.asarray(sums, dtype=np.float64).reshape(-1))

    def shifted(self, tokens: int) -> "SparseFirings":
        """The same firings, `tokens` tokens later."""
        return SparseFirings(self.matrix[np.roll(np.arange(self.tokens), tokens)])


@final
@dataclass(frozen=True)
class DeviceFirings(Firings):
    """Firings as indices on a GPU. Co-firings are counted by products of dense matrices of ones and zeros, some tokens at a time."""

    rows: Int[Tensor, " nnz"]
    """The token of each firing, ascending."""
    latents: Int[Tensor, " nnz"]
    """The latent of each firing."""
    size: tuple[int, int]
    """Number of tokens and of latents."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tokens and of latents."""
        return self.size

    @property
    def counts(self) -> Float[Tensor, " d_sae"]:
        """Number of tokens that each latent fired on."""
        ones = torch.ones(len(self.latents), dtype=torch.float64, device=self.latents.device)
        return ones.new_zeros(self.size[1]).scatter_add_(0, self.latents, ones)

    def cofirings(self, other: "DeviceFirings", rows: int) -> Iterator[tuple[int, Float[Tensor, "row other"]]]:
        """Yield the first latent and the counts of each tile.

        Every entry of a product is a number of tokens of one chunk. In float32 it is exact, because a chunk has fewer than 2^24 tokens; the
        chunks are added in float64.
        """
        chunk_tokens = max(1, min(EXACT_TOKENS - 1, DENSE_ELEMENTS // max(self.size[1], other.size[1])))
        ends = [*range(0, self.tokens, chunk_tokens), self.tokens]
        borders, other_borders = (firings.firings_before(ends) for firings in (self, other))
        for start in range(0, self.size[1], rows):
            stop = min(start + rows, self.size[1])
            total = torch.zeros(stop - start, other.size[1], dtype=torch.float64, device=self.latents.device)
            for chunk in range(len(ends) - 1):
                tokens = slice(ends[chunk], ends[chunk + 1])
                right = other.dense(tokens, slice(*other_borders[chunk : chunk + 2]))
                left = right if other is self else self.dense(tokens, slice(*borders[chunk : chunk + 2]))
                total += exact_product(left[:, start:stop].T, right)
            yield start, total

    def firings_before(self, tokens: Sequence[int]) -> list[int]:
        """Number of firings on the tokens before each of these tokens. The host waits for it."""
        return torch.searchsorted(self.rows, torch.tensor(tokens, device=self.rows.device)).tolist()

    def dense(self, tokens: slice, firings: slice) -> Float[Tensor, "token d_sae"]:
        """The dense matrix of ones and zeros for some tokens; `firings` are the indices of their firings."""
        rows, latents = self.rows[firings] - tokens.start, self.latents[firings]
        # Ones and zeros are exact in bfloat16, which GPUs multiply fastest.
        dtype = torch.bfloat16 if rows.device.type == "cuda" else torch.float32
        matrix = torch.zeros(tokens.stop - tokens.start, self.size[1], dtype=dtype, device=rows.device)
        matrix.view(-1).index_fill_(0, rows * self.size[1] + latents, 1.0)
        return matrix

    def pair_cofirings(self, left: Sequence[int], right: Sequence[int]) -> Float[Tensor, " pair"]:
        """Co-firing counts of some pairs of latents, a pair at a time."""
        counts = [(self._column(a) * self._column(b)).sum() for a, b in zip(left, right, strict=True)]
        return torch.stack(counts).cpu() if counts else torch.zeros(0, dtype=torch.float64)

    def _column(self, latent: int) -> Tensor:
        """Ones where one latent fired, zeros elsewhere."""
        fired = (self.latents == latent).double()
        return fired.new_zeros(self.tokens).scatter_add_(0, self.rows, fired)

    def shifted(self, tokens: int) -> "DeviceFirings":
        """The same firings, `tokens` tokens later."""
        rows, order = ((self.rows + tokens) % max(self.tokens, 1)).sort(stable=True)
        return DeviceFirings(rows, self.latents[order], self.size)


def exact_product(a: Float[Tensor, "row inner"], b: Float[Tensor, "inner column"]) -> Float[Tensor, "row column"]:
    """The product of two matrices of ones and zeros as float32, exact if `inner` is below 2^24.

    The terms are 0 or 1 and all partial sums are whole numbers below 2^24, so accumulation in float32 is exact in any order, with TF32 too.
    A product in bfloat16 would be rounded at the end: torch 2.8 and later return float32 from it, earlier versions multiply in float32.

    >>> exact_product(torch.ones(1, 3), torch.ones(3, 1)).item()
    3.0
    """
    if a.dtype == torch.float32:
        return a @ b
    try:
        return torch.mm(a, b, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return a.float() @ b.float()

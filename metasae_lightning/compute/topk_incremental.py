"""Exact top-k for inputs and weights that move little between calls."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.row_chunks import is_blocked, row_chunks
from metasae_lightning.compute.sparse_matrix import Pattern
from metasae_lightning.compute.topk import SLACK, BlockwiseEncoder, TopK, select_largest

# Candidates per selected activation. More candidates last for more steps, and each costs a dot product of two rows at every step.
CANDIDATES_PER_SELECTED = 4
# From one call to the next the threshold changes by a smaller factor than this. If the bound exceeds the last threshold times this factor,
# a full search is certain, and the candidates need not be re-ranked first.
MAX_THRESHOLD_GROWTH = 1.05


@dataclass(frozen=True)
class Reference:
    """Inputs, weights and candidates of the last full search."""

    x: Float[Tensor, "row d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    pattern: Pattern
    """Rows and latents of the candidates."""
    bound: float
    """Upper bound, at the full search, on every pre-activation that is not a candidate."""
    max_row_norm: float
    """The largest norm of a row of `x`."""


class IncrementalTopK:
    """Exact top-k of a batch that ranks only the candidates of the last full search, until others could be among the largest.

    For row `r`, encoder column `e` and bias `b`, the pre-activation `r . e + b` changes by at most `|r - r0| |e| + |r0| |e - e0| + |b -
    b0|`, where `r0`, `e0` and `b0` are those of the last full search. As long as the smallest selected activation is larger than this bound
    allows for any pre-activation that was not a candidate, the selection is that of a full search. Otherwise a full search follows. Values
    come from the same dot products of two rows in either case, so the result does not depend on when the last full search was.

    Args:
        rows: Number of rows of the batches, which hold the same inputs again and again, such as a decoder's rows. Batches with another
            number of rows, such as a random subset, are not supported.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._reference: Reference | None = None
        self._threshold = 0.0
        self.searches = 0
        """Number of full searches."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_reference": None, "_threshold": 0.0}

    def supports(self, encoder: BlockwiseEncoder) -> bool:
        """Whether this encoder's search can be incremental.

        It can be on a CPU, with `rows` rows, in full precision, without a scale, in one process and outside inference mode. Elsewhere a
        full search takes little of the time, or is divided among ranks. A reference made in inference mode could not be written to later.
        """
        full_precision = encoder.x.dtype == encoder.b_enc.dtype
        same_rows = encoder.n_rows == self.rows
        writable = is_blocked(encoder.x) and not torch.is_inference_mode_enabled()
        return full_precision and encoder.scale is None and encoder.world.is_single and same_rows and writable

    def top_k(self, encoder: BlockwiseEncoder, count: int) -> TopK:
        """The `count` largest positive activations of the batch; fewer where fewer are positive."""
        reference = self._reference
        if reference is not None and reference.x.shape == encoder.x.shape and reference.x.dtype == encoder.x.dtype:
            limit = MAX_THRESHOLD_GROWTH * self._threshold
            bound = reference.bound + _weight_drift_bound(reference, encoder)
            if bound <= limit and (bound := bound + _input_drift_bound(reference, encoder)) <= limit:
                encoder.compute_extra()
                selected = _rank_candidates(reference.pattern, encoder, count)
                self._threshold = selected.threshold or 0.0
                if selected.threshold is not None and len(selected.values) == count and selected.threshold * (1 - SLACK) >= bound:
                    return selected
        self._reference = reference = self._search(encoder, count)
        selected = _rank_candidates(reference.pattern, encoder, count)
        self._threshold = selected.threshold or 0.0
        return selected

    def _search(self, encoder: BlockwiseEncoder, count: int) -> Reference:
        """Search in full for the candidates, and copy the inputs and weights that they belong to."""
        self.searches += 1
        n_candidates = CANDIDATES_PER_SELECTED * count
        values, _, flat_indices = encoder.largest(n_candidates)
        encoder.compute_extra()  # the same product as in a call without a full search
        rows = flat_indices // encoder.n_latents
        last = self._reference
        x = (
            last.x.copy_(encoder.x)
            if last is not None and last.x.shape == encoder.x.shape and last.x.dtype == encoder.x.dtype
            else encoder.x.clone()
        )
        bound = values.min().item() if len(values) == n_candidates and n_candidates else 0.0
        pattern = Pattern(rows, flat_indices - rows * encoder.n_latents, (len(x), encoder.n_latents))
        return Reference(x, encoder.W_enc.clone(), encoder.b_enc.clone(), pattern, bound, x.norm(dim=1).max().item())


def _rank_candidates(candidates: Pattern, encoder: BlockwiseEncoder, count: int) -> TopK:
    """The `count` largest positive activations among the candidates."""
    values = candidates.sampled(encoder.x, encoder.W_enc.T.contiguous()) + encoder.b_enc[candidates.columns]
    nonzeros = torch.arange(len(values), device=values.device)
    selected, _, nonzero = select_largest([(values, values, nonzeros)], count)
    return TopK(selected, candidates.rows[nonzero], candidates.columns[nonzero], selected.min().item() if len(selected) else None)


def _input_drift_bound(reference: Reference, encoder: BlockwiseEncoder) -> float:
    """Bound on the change of any pre-activation caused by the change of the rows of `x`."""
    row_change = max((x - x_then).norm(dim=1).max().item() for x, x_then in row_chunks(encoder.x, reference.x))
    return row_change * encoder.W_enc.norm(dim=0).max().item()


def _weight_drift_bound(reference: Reference, encoder: BlockwiseEncoder) -> float:
    """Bound on the change of any pre-activation caused by the change of `W_enc` and `b_enc`."""
    encoder_change = (encoder.W_enc - reference.W_enc).norm(dim=0).max().item()
    return reference.max_row_norm * encoder_change + (encoder.b_enc - reference.b_enc).abs().max().item()

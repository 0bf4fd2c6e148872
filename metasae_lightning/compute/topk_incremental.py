"""Exact top-k for inputs and weights that move little between calls."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.row_chunks import is_blocked, row_chunks
from metasae_lightning.compute.sparse_matrix import Pattern
from metasae_lightning.compute.topk import SLACK, BlockwiseEncoder, TopK, select_largest

# Candidates, times what is kept: more last for more steps, and each costs a product of two rows at every one of them.
SPARE = 4
# From one reading to the next the smallest of the kept changes by less: beyond it a search is certain, and nothing need be looked at first.
STEADY = 1.05


@dataclass(frozen=True)
class Reference:
    """Inputs, weights and candidates of the last full search."""

    x: Float[Tensor, "row d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    pattern: Pattern
    """The candidates."""
    floor: float
    """Upper bound, at the full search, on every pre-activation that is not a candidate."""
    longest: float
    """The largest norm of a row."""


class IncrementalTopK:
    """Exact top-k that re-ranks the candidates of the last full search, and searches in full once the bound allows a newcomer.

    `r . e + b` moves by at most `|r - r0| |e| + |r0| |e - e0| + |b - b0|`. As long as the smallest of the kept is larger than anything
    that was not a candidate can have become, the kept are the ones that a search through everything would have kept; as soon as it is
    not, everything is searched. Values come from the same products of two rows in either case, so when that was leaves no trace.

    Args:
        rows: Number of rows of the inputs that recur. Batches with another number of rows, such as a random subset, are not supported.
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
        """On a CPU, in full precision, without a scale and in one process; elsewhere a search is not what takes the time, or is divided.

        Nor where what is made cannot be written to later.
        """
        plain = encoder.x.dtype == encoder.b_enc.dtype and encoder.scale is None and encoder.ranks.is_single
        return plain and encoder.rows == self.rows and is_blocked(encoder.x) and not torch.is_inference_mode_enabled()

    def keep(self, encoder: BlockwiseEncoder, count: int) -> TopK:
        """The `count` largest activations of the batch, of positive ones alone."""
        reference = self._reference
        if reference is not None and reference.x.shape == encoder.x.shape and reference.x.dtype == encoder.x.dtype:
            bound = reference.floor + _weight_drift_bound(reference, encoder)
            if bound <= STEADY * self._threshold and (bound := bound + _input_drift_bound(reference, encoder)) <= STEADY * self._threshold:
                encoder.compute_extra()
                kept = _rank_candidates(reference.pattern, encoder, count)
                self._threshold = kept.threshold or 0.0
                if kept.threshold is not None and len(kept.values) == count and kept.threshold * (1 - SLACK) >= bound:
                    return kept
        self._reference = reference = self._search(encoder, count)
        kept = _rank_candidates(reference.pattern, encoder, count)
        self._threshold = kept.threshold or 0.0
        return kept

    def _search(self, encoder: BlockwiseEncoder, count: int) -> Reference:
        self.searches += 1
        wanted = SPARE * count
        values, _, places = encoder.top(wanted)
        encoder.compute_extra()  # by the same product as where nothing is searched
        rows = places // encoder.latents
        old = self._reference
        x = (
            old.x.copy_(encoder.x)
            if old is not None and old.x.shape == encoder.x.shape and old.x.dtype == encoder.x.dtype
            else encoder.x.clone()
        )
        floor = values.min().item() if len(values) == wanted and wanted else 0.0
        pattern = Pattern(rows, places - rows * encoder.latents, (len(x), encoder.latents))
        return Reference(x, encoder.W_enc.clone(), encoder.b_enc.clone(), pattern, floor, x.norm(dim=1).max().item())


def _rank_candidates(pattern: Pattern, encoder: BlockwiseEncoder, count: int) -> TopK:
    values = pattern.sampled(encoder.x, encoder.W_enc.T.contiguous()) + encoder.b_enc[pattern.columns]
    places = torch.arange(len(values), device=values.device)
    kept, _, at = select_largest([(values, values, places)], count)
    return TopK(kept, pattern.rows[at], pattern.columns[at], kept.min().item() if len(kept) else None)


def _input_drift_bound(reference: Reference, encoder: BlockwiseEncoder) -> float:
    """Bound on the change of any pre-activation caused by the change of the rows."""
    rows = max((now - then).norm(dim=1).max().item() for now, then in row_chunks(encoder.x, reference.x))
    return rows * encoder.W_enc.norm(dim=0).max().item()


def _weight_drift_bound(reference: Reference, encoder: BlockwiseEncoder) -> float:
    """Bound on the change of any pre-activation caused by the change of `W_enc` and `b_enc`."""
    turned = (encoder.W_enc - reference.W_enc).norm(dim=0).max().item()
    return reference.longest * turned + (encoder.b_enc - reference.b_enc).abs().max().item()

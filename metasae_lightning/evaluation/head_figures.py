"""Figures of a head on codes, beside those of the SAE alone."""

from jaxtyping import Float
from torch import Tensor

from metasae_lightning.evaluation.collect import CollectedCodes, SplicedLosses

Resamples = dict[str, Float[Tensor, " resample"]]
LOSSES = ("ce_sae", "kl", "recovered_zero", "recovered_mean")
"""The figures of the language model's losses that are measured with the head too."""


def head_figures(collected: CollectedCodes, spliced: SplicedLosses | None, with_head: SplicedLosses | None) -> dict[str, float]:
    """FVU and losses of the SAE together with its head, and as `*_change` their differences from those of the SAE alone."""
    _, sums, total = collected.by_document
    spread = sums[:, 1].sum() - total.sum(0).square().sum() / sums[:, 0].sum()
    error = collected.head_error_by_document
    figures = {"fvu": (error.sum() / spread).item(), "fvu_change": ((error - sums[:, 2]).sum() / spread).item()}
    if spliced is not None and with_head is not None:
        alone, together = spliced.figures(), with_head.figures()
        figures |= {name: together[name] for name in LOSSES}
        figures |= {f"{name}_change": together[name] - alone[name] for name in LOSSES[:2]}
    return figures


def resampled_head_figures(
    collected: CollectedCodes,
    weights: Float[Tensor, "resample document"],
    without: Resamples,
    with_head: Resamples | None,
) -> Resamples:
    """`head_figures` on resampled documents, each name with `head_` before it. `without` has the figures of the SAE alone.

    The losses `with_head` and `without` are of the same resamples of the spliced documents.
    """
    _, sums, total = collected.by_document
    tokens, squares = (weights @ sums[:, :2]).T
    fvu = (weights @ collected.head_error_by_document) / (squares - (weights @ total).square().sum(1) / tokens)
    resamples = {"head_fvu": fvu, "head_fvu_change": fvu - without["fvu"]}
    if with_head is not None:
        resamples |= {f"head_{name}": with_head[name] for name in LOSSES}
        resamples |= {f"head_{name}_change": with_head[name] - without[name] for name in LOSSES[:2]}
    return resamples

"""Callback that draws figures of the primary SAE after each validation: firing rates, decoder geometry and co-firing."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.sharding import full
from metasae_lightning.metrics.cofiring import PhiSample
from metasae_lightning.training.arm_callbacks import Observer


class Figures(Observer):
    """Write histograms and curves to every logger that accepts them, such as TensorBoard's.

    `val/log10_density`: firing rates of latents that fired. `decoder/nearest_cosine`: cosine of each decoder row with its nearest.
    `val/phi_tail`: share of random pairs of latents with |phi| above a value, beside independent latents with the same counts.
    `decoder/spectrum`: singular values of the decoder.

    Args:
        matchings: Random pairings of all latents for |phi|.
    """

    def __init__(self, matchings: int = 8) -> None:
        self.matchings = matchings
        self._sample: PhiSample | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Reset the metrics, if a logger accepts figures."""
        # Rank 0 decides, because other ranks have dummy loggers.
        wanted = trainer.strategy.broadcast(bool(writers(trainer)) and not trainer.sanity_checking)
        self._sample = PhiSample(pl_module.primary.W_dec.shape[0], matchings=self.matchings).to(pl_module.device) if wanted else None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Update the metrics."""
        if self._sample is not None:
            self._sample.update(outputs["output"].codes)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw the figures and write them to the loggers."""
        if self._sample is None:
            return
        with self._sample.sync_context():
            tokens, firings = int(self._sample.tokens), self._sample.firings.cpu()
            both, one, other = (count.cpu() for count in pairs(self._sample))
        self._sample = None
        W_dec, live = full(pl_module.primary.W_dec.detach()).float(), firings > 0
        if not trainer.is_global_zero:
            return
        histograms = {"decoder/nearest_cosine": functional.nearest_cosines(W_dec).cpu()}
        drawn = {"decoder/spectrum": spectrum(functional.spectrum(W_dec).cpu())}
        if live.any():
            histograms["val/log10_density"] = (firings[live].double() / tokens).log10()
        if len(both):
            title = f"{tokens:,} tokens, {int((~live).sum()):,} of {len(live):,} latents dead"
            drawn["val/phi_tail"] = tail(both, one, other, tokens, title=title)
        # The step at which Lightning logs validation metrics.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage]
        for writer in writers(trainer):
            for name, values in histograms.items():
                writer.add_histogram(name, values, step)
            for name, figure in drawn.items():
                writer.add_figure(name, figure, step, close=False)


def writers(trainer: Trainer) -> list[Any]:
    """Experiments of the loggers that accept histograms and figures."""
    found = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    return [writer for writer in found if hasattr(writer, "add_histogram") and hasattr(writer, "add_figure")]


def pairs(sample: PhiSample) -> tuple[Tensor, Tensor, Tensor]:
    """For each random pair of live latents: tokens on which both fired, the first fired, the second fired."""
    matching, low = (sample.partner >= 0).nonzero(as_tuple=True)
    both, one, other = sample.together[matching, low], sample.firings[low], sample.firings[sample.partner[matching, low]]
    live = (one > 0) & (one < sample.tokens) & (other > 0) & (other < sample.tokens)
    return both[live], one[live], other[live]


def tail(both: Tensor, one: Tensor, other: Tensor, tokens: int, *, title: str) -> Figure:
    """Share of pairs above each |phi|, for measured pairs and for independent ones with the same counts."""
    chance = np.random.default_rng(0).hypergeometric(one.numpy(), tokens - one.numpy(), other.numpy())
    at = torch.logspace(-5, 0, 201, dtype=torch.float64)
    figure, axes = axes_of(title, "|phi|", "share of pairs above it")
    for name, together in (("pairs of latents", both), ("independent, same counts", torch.from_numpy(chance))):
        phi = functional.phi(together.double(), one.double(), other.double(), float(tokens)).abs()
        axes.plot(at, functional.share_above(phi, at), label=name)
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="mask")
    axes.legend()
    return figure


def spectrum(values: Tensor) -> Figure:
    """A figure of the decoder's singular values."""
    figure, axes = axes_of("decoder directions", "number", "singular value, their squares summing to 1")
    axes.plot(torch.arange(1, len(values) + 1), values)
    axes.set_yscale("log", nonpositive="mask")
    return figure


def axes_of(title: str, x: str, y: str) -> tuple[Figure, Any]:
    """A figure that pyplot does not manage, and its axes."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes

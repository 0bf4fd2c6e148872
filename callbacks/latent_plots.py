"""Plots of the primary SAE after each validation, for loggers: firing rates, decoder directions and phi coefficients."""

from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.architectures import Units
from metasae_lightning.callbacks.logger_media import log_figure, log_histogram, media_loggers
from metasae_lightning.compute.sharding import full
from metasae_lightning.metrics.cofiring import PhiSample
from metasae_lightning.training.arm_callbacks import Observer


class Figures(Observer):
    """Write histograms and plots after each validation to every logger that accepts them: those of TensorBoard, W&B and MLflow.

    `val/log10_density` is the histogram of the firing rates of the latents that fired. `decoder/nearest_cosine` is the histogram of each
    decoder row's cosine with its nearest other row. `val/phi_tail` plots the fraction of random pairs of latents whose |phi| exceeds a
    value, together with the same curve for independent latents of the same firing counts. `decoder/spectrum` plots the decoder's
    singular values.

    Args:
        matchings: Number of random pairings of all latents that |phi| is computed on.
    """

    def __init__(self, matchings: int = 8) -> None:
        self.matchings = matchings
        self._sample: PhiSample | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Create the counter of firings, where a logger accepts plots and this is not the sanity check."""
        # Rank zero decides for all ranks: the other ranks have dummy loggers that accept every call.
        wanted = trainer.strategy.broadcast(bool(media_loggers(trainer)) and not trainer.sanity_checking)
        count = Units.of(pl_module.primary.sae.cfg).count
        self._sample = PhiSample(count, matchings=self.matchings).to(pl_module.device) if wanted else None

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count the batch's firings."""
        if self._sample is not None:
            self._sample.update(outputs["output"].codes)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Sum the counts of all ranks; rank zero draws the plots and writes them."""
        if self._sample is None:
            return
        with self._sample.sync_context():
            tokens, firings = int(self._sample.tokens), self._sample.firings.cpu()
            both, first, second = (count.cpu() for count in pair_counts(self._sample))
        self._sample = None
        W_dec, live = full(pl_module.primary.W_dec.detach()).float(), firings > 0
        if not trainer.is_global_zero:
            return
        histograms = {"decoder/nearest_cosine": functional.nearest_cosines(W_dec).cpu()}
        plots = {"decoder/spectrum": spectrum_plot(functional.spectrum(W_dec).cpu())}
        if live.any():
            histograms["val/log10_density"] = (firings[live].double() / tokens).log10()
        if len(both):
            title = f"{tokens:,} tokens, {int((~live).sum()):,} of {len(live):,} latents dead"
            plots["val/phi_tail"] = phi_tail_plot(both, first, second, tokens, title=title)
        # The step at which Lightning logs the numbers of this validation; its own callbacks read it in the same way.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped  # pyright: ignore[reportPrivateUsage]
        for logger in media_loggers(trainer):
            for name, values in histograms.items():
                log_histogram(logger, name, values, step)
            for name, figure in plots.items():
                log_figure(logger, name, figure, step)


def pair_counts(sample: PhiSample) -> tuple[Tensor, Tensor, Tensor]:
    """For each random pair of latents: on how many tokens both fired, the first fired, and the second fired.

    A pair with a latent that fired on no token or on every token has no phi coefficient, and is left out.
    """
    matching, low = (sample.partner >= 0).nonzero(as_tuple=True)
    both, first, second = sample.together[matching, low], sample.firings[low], sample.firings[sample.partner[matching, low]]
    defined = (first > 0) & (first < sample.tokens) & (second > 0) & (second < sample.tokens)
    return both[defined], first[defined], second[defined]


def phi_tail_plot(both: Tensor, first: Tensor, second: Tensor, tokens: int, *, title: str) -> Figure:
    """Plot the fraction of pairs above each |phi|: for the counts from `pair_counts`, and for independent latents that fire as often."""
    independent = np.random.default_rng(0).hypergeometric(first.numpy(), tokens - first.numpy(), second.numpy())
    thresholds = torch.logspace(-5, 0, 201, dtype=torch.float64)
    figure, axes = labelled_axes(title, "|phi|", "share of pairs above it")
    for name, together in (("pairs of latents", both), ("independent, same counts", torch.from_numpy(independent))):
        phi = functional.phi(together.double(), first.double(), second.double(), float(tokens)).abs()
        axes.plot(thresholds, functional.share_above(phi, thresholds), label=name)
    axes.set_xscale("log")
    axes.set_yscale("log", nonpositive="mask")
    axes.legend()
    return figure


def spectrum_plot(values: Tensor) -> Figure:
    """Plot of the decoder's singular values, from the largest to the smallest."""
    figure, axes = labelled_axes("decoder directions", "number", "singular value, their squares summing to 1")
    axes.plot(torch.arange(1, len(values) + 1), values)
    axes.set_yscale("log", nonpositive="mask")
    return figure


def labelled_axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    """A new figure with one pair of labelled axes. pyplot does not know the figure, so it need not be closed."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    return figure, axes

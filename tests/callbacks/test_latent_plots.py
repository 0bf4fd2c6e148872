"""Plots for TensorBoard: they equal direct computations from firings and decoder rows, and have the steps of the validations."""

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import yaml
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from sae_lens import TopKTrainingSAEConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.callbacks import Figures, HeldOut
from metasae_lightning.callbacks.latent_plots import phi_tail_plot
from metasae_lightning.cli.recipes import RECIPES
from metasae_lightning.metrics import PhiSample
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch, Codes
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import Batches, config
from tests.helpers.ranks import on_two_ranks

TAGS = {"val/log10_density", "decoder/nearest_cosine", "val/phi_tail", "decoder/spectrum"}


HELD_OUT = Batches(5, 500)


def fit_joint(folder: Path, *callbacks: Any, **changes: Any) -> JointSAE:
    module = JointSAE(config("batchtopk"), config("batchtopk", 8), {"d": Decomposability(0.3)}, n_p=4, n_m=2)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    options = {"max_epochs": 1, "accelerator": "cpu", "val_check_interval": 4, "logger": False, **quiet, **changes}
    Trainer(**options, default_root_dir=folder, callbacks=list(callbacks)).fit(module, Batches(12), HELD_OUT)
    return module


def held_out_firings(module: JointSAE) -> Tensor:
    """Held-out tokens x latents: 1 where the latent fires."""
    dense = torch.zeros(64 * len(HELD_OUT), 48, dtype=torch.float64)
    for i, batch in enumerate(HELD_OUT):
        codes = module.evaluate(Batch.of(batch)).codes
        dense[64 * i + codes.rows, codes.latents] = 1
    return dense


class RecordingWriter:
    """A stand-in for TensorBoard's writer that stores histograms and figures."""

    def __init__(self) -> None:
        self.histograms: dict[str, list[tuple[int, Tensor]]] = {}
        self.figures: dict[str, list[tuple[int, Any]]] = {}

    def add_histogram(self, tag: str, values: Any, global_step: int) -> None:
        self.histograms.setdefault(tag, []).append((global_step, values))

    def add_figure(self, tag: str, figure: Any, global_step: int, close: bool = True) -> None:
        self.figures.setdefault(tag, []).append((global_step, figure))

    def curves(self, tag: str) -> dict[str, tuple[Any, Any]]:
        (axes,) = self.figures[tag][-1][1].axes
        return {line.get_label(): line.get_data() for line in axes.lines}


class RecordingLogger(Logger):
    """A logger of another class than TensorBoard's, with a writer of the same interface."""

    name, version = "recording", 0

    def __init__(self, writer: RecordingWriter) -> None:
        super().__init__()
        self.experiment = writer

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


@pytest.fixture(scope="module")
def module_and_writer(tmp_path_factory: pytest.TempPathFactory) -> tuple[JointSAE, RecordingWriter]:
    writer, folder = RecordingWriter(), tmp_path_factory.mktemp("watched")
    return fit_joint(folder, Figures(), logger=[CSVLogger(folder), RecordingLogger(writer)]), writer


def test_tensorboard_has_the_plots_at_the_steps_of_the_validations(tmp_path: Path):
    loggers = [TensorBoardLogger(tmp_path, name="tensorboard", version=""), CSVLogger(tmp_path / "csv")]
    module = fit_joint(tmp_path, HeldOut(), Figures(), logger=loggers, log_every_n_steps=1, num_sanity_val_steps=2)
    events_file = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "histograms": 0}).Reload()
    assert {*events_file.Tags()["histograms"], *events_file.Tags()["images"]} == TAGS
    steps = [event.step for event in events_file.Scalars("val/fvu")]
    assert len(steps) == 3
    for tag in TAGS:
        events = events_file.Histograms(tag) if tag in events_file.Tags()["histograms"] else events_file.Images(tag)
        assert [event.step for event in events] == steps
    density = held_out_firings(module).mean(0)
    histogram = events_file.Histograms("val/log10_density")[-1].histogram_value
    assert histogram.num == (density > 0).sum() and histogram.sum == pytest.approx(density[density > 0].log10().sum().item())
    assert {(image.width, image.height) for image in events_file.Images("val/phi_tail")} == {(600, 400)}
    assert not plt.get_fignums()


def test_histograms_show_densities_of_live_latents_and_nearest_cosines_of_rows(module_and_writer: tuple[JointSAE, RecordingWriter]):
    module, writer = module_and_writer
    density, rows = held_out_firings(module).mean(0), functional.unit_rows(module.primary.W_dec.detach())
    torch.testing.assert_close(writer.histograms["val/log10_density"][-1][1], density[density > 0].log10())
    nearest = (rows @ rows.T - 2 * torch.eye(48)).amax(1)
    torch.testing.assert_close(writer.histograms["decoder/nearest_cosine"][-1][1], nearest)


def test_the_phi_tail_equals_that_of_the_correlations_of_the_sampled_pairs(module_and_writer: tuple[JointSAE, RecordingWriter]):
    module, writer = module_and_writer
    dense, partner = held_out_firings(module), PhiSample(48).partner
    live = [i for i in range(48) if 0 < dense[:, i].sum() < len(dense)]
    pairs = [(low, int(high)) for row in partner for low, high in enumerate(row) if low in live and int(high) in live]
    absolute_phi = torch.corrcoef(dense.T)[tuple(torch.tensor(pairs).T)].abs().numpy()
    curves = writer.curves("val/phi_tail")
    thresholds, fractions = curves["pairs of latents"]
    # Leaves out thresholds that equal a pair's value up to rounding.
    clear_of_pairs = [i for i, x in enumerate(thresholds) if abs(absolute_phi - float(x)).min() > 1e-9]
    assert len(pairs) > 100 and len(clear_of_pairs) > 190
    assert [float(fractions[i]) for i in clear_of_pairs] == pytest.approx(
        [(absolute_phi > float(thresholds[i])).mean() for i in clear_of_pairs]
    )
    assert writer.figures["val/phi_tail"][-1][1].axes[0].get_title() == f"320 tokens, {48 - len(live)} of 48 latents dead"


@pytest.mark.parametrize("independent", [True, False])
def test_the_chance_curve_matches_independent_latents_and_not_correlated_ones(independent: bool):
    rng, n = np.random.default_rng(3), 2000
    counts_a, counts_b = (torch.from_numpy(rng.integers(20, 400, 4000)) for _ in range(2))
    cofirings = torch.from_numpy(rng.hypergeometric(counts_a.numpy(), n - counts_a.numpy(), counts_b.numpy()))
    lines = {
        line.get_label(): np.asarray(line.get_ydata())
        for line in phi_tail_plot(cofirings + (0 if independent else 20), counts_a, counts_b, n, title="").axes[0].lines
    }
    distance = abs(lines["pairs of latents"] - lines["independent, same counts"]).max()
    # The distance of two empirical distributions of 4,000 exceeds 0.044 once in a thousand times (Kolmogorov-Smirnov).
    assert distance < 0.05 if independent else distance > 0.3
    # The mean |phi| expected by chance is the area under the chance curve.
    expected = functional.phi_by_chance(counts_a.double(), counts_b.double(), float(n)).mean().item()
    assert np.trapezoid(lines["independent, same counts"], np.logspace(-5, 0, 201)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("shape", [(48, 16), (5, 9), (5000, 12)])
def test_the_spectrum_equals_the_normalised_singular_values_of_unit_rows(
    shape: tuple[int, int], module_and_writer: tuple[JointSAE, RecordingWriter]
):
    W_dec = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * torch.arange(1, shape[1] + 1)
    spectrum = functional.spectrum(W_dec)
    expected = torch.linalg.svdvals(functional.unit_rows(W_dec))
    torch.testing.assert_close(spectrum[: len(expected)], expected / expected.norm(), rtol=1e-9, atol=1e-7)
    assert spectrum.square().sum().item() == pytest.approx(1) and (spectrum[len(expected) :] < 1e-7).all()
    module, writer = module_and_writer
    ((number, values),) = writer.curves("decoder/spectrum").values()
    assert list(number) == list(range(1, 17))
    torch.testing.assert_close(torch.as_tensor(values), functional.spectrum(module.primary.W_dec.detach()))


def test_plots_leave_training_unchanged_and_sample_nothing_without_a_writer(
    tmp_path: Path, module_and_writer: tuple[JointSAE, RecordingWriter]
):
    class CountingFigures(Figures):
        samples = 0

        def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            super().on_validation_epoch_start(trainer, pl_module)
            CountingFigures.samples += self._sample is not None

    for logger in (False, CSVLogger(tmp_path)):
        module = fit_joint(tmp_path, CountingFigures(), logger=logger)
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in module_and_writer[0].state_dict().items())
    assert CountingFigures.samples == 0


def validate_on(dense: Tensor, **changes: Any) -> RecordingWriter:
    """Run the callback on one validation batch with these firings, without training; return the writer."""
    writer, callback = RecordingWriter(), Figures(matchings=2)
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    state = {"is_global_zero": True, "sanity_checking": False, "strategy": SimpleNamespace(broadcast=lambda value: value)}
    trainer = Mock(spec=Trainer, loggers=[SimpleNamespace(experiment=writer)], fit_loop=fit_loop, **{**state, **changes})
    module = LightningModule()
    W_dec = torch.randn(dense.shape[1], 8, generator=torch.Generator().manual_seed(0))
    sae = SimpleNamespace(cfg=TopKTrainingSAEConfig(d_in=8, d_sae=dense.shape[1], k=1))
    module.primary = SimpleNamespace(W_dec=W_dec, sae=sae)  # type: ignore[assignment]
    callback.on_validation_epoch_start(trainer, module)
    callback.on_validation_batch_end(trainer, module, {"output": SimpleNamespace(codes=Codes.from_dense(dense))}, None, 0)
    callback.on_validation_epoch_end(trainer, module)
    return writer


def test_dead_latents_are_left_out_of_the_density_and_phi_plots():
    assert set(validate_on(torch.zeros(10, 6)).histograms) == {"decoder/nearest_cosine"} and set(
        validate_on(torch.zeros(10, 6)).figures
    ) == {"decoder/spectrum"}
    single_firing = torch.zeros(10, 6)
    single_firing[3, 2] = 1
    assert validate_on(single_firing).histograms["val/log10_density"][0][1].tolist() == [-1.0]
    assert set(validate_on(single_firing).figures) == {"decoder/spectrum"}


def firings() -> Tensor:
    return (torch.rand(600, 20, generator=torch.Generator().manual_seed(5)) < torch.linspace(0, 0.3, 20)).float()


@contextmanager
def process_group(rank: int, folder: str) -> Any:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def broadcast_from_rank_zero(value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def plot_on_rank(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        local_firings = firings()[:250] if rank == 0 else firings()[250:]
        writer = validate_on(local_firings, is_global_zero=rank == 0, strategy=SimpleNamespace(broadcast=broadcast_from_rank_zero))
    torch.save(summary(writer) if writer.figures else None, f"{folder}/{rank}.pt")


def summary(writer: RecordingWriter) -> Any:
    curve = writer.curves("val/phi_tail")["pairs of latents"][1]
    return writer.histograms["val/log10_density"][0][1].tolist(), [float(y) for y in curve]


def test_rank_zero_plots_the_counts_of_all_ranks_and_others_plot_nothing(tmp_path: Path):
    on_two_ranks(plot_on_rank, tmp_path)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [summary(validate_on(firings())), None]


@pytest.mark.parametrize("name", ["quickstart", "gpt2_large_l20", "gemma2_9b_l23"])
def test_recipes_on_language_models_have_the_figures_callback(name: str):
    callbacks = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["trainer"]["callbacks"]
    assert {"class_path": "Figures"} in callbacks

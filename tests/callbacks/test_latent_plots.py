"""Pictures for TensorBoard: what is drawn is what the metrics and plain linear algebra say, where the loggers' numbers lie."""

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


def fitted(folder: Path, *callbacks: Any, **more: Any) -> JointSAE:
    module = JointSAE(config("batchtopk"), config("batchtopk", 8), {"d": Decomposability(0.3)}, n_p=4, n_m=2)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    options = {"max_epochs": 1, "accelerator": "cpu", "val_check_interval": 4, "logger": False, **quiet, **more}
    Trainer(**options, default_root_dir=folder, callbacks=list(callbacks)).fit(module, Batches(12), HELD_OUT)
    return module


def fired(module: JointSAE) -> Tensor:
    """Held-out tokens x latents, whether it fired."""
    dense = torch.zeros(64 * len(HELD_OUT), 48, dtype=torch.float64)
    for i, batch in enumerate(HELD_OUT):
        codes = module.evaluate(Batch.of(batch)).codes
        dense[64 * i + codes.rows, codes.latents] = 1
    return dense


class Kept:
    """What TensorBoard's writer would be given."""

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


class ToKept(Logger):
    """A logger that is not TensorBoard's, and whose writer takes what TensorBoard's takes."""

    name, version = "kept", 0

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.experiment = kept

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any) -> None:
        pass


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[JointSAE, Kept]:
    kept, folder = Kept(), tmp_path_factory.mktemp("watched")
    return fitted(folder, Figures(), logger=[CSVLogger(folder), ToKept(kept)]), kept


def test_tensorboard_holds_them_beside_the_validations_numbers(tmp_path: Path):
    loggers = [TensorBoardLogger(tmp_path, name="tensorboard", version=""), CSVLogger(tmp_path / "csv")]
    module = fitted(tmp_path, HeldOut(), Figures(), logger=loggers, log_every_n_steps=1, num_sanity_val_steps=2)
    written = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "histograms": 0}).Reload()
    assert {*written.Tags()["histograms"], *written.Tags()["images"]} == TAGS
    steps = [event.step for event in written.Scalars("val/fvu")]
    assert len(steps) == 3
    for tag in TAGS:
        events = written.Histograms(tag) if tag in written.Tags()["histograms"] else written.Images(tag)
        assert [event.step for event in events] == steps
    density = fired(module).mean(0)
    last = written.Histograms("val/log10_density")[-1].histogram_value
    assert last.num == (density > 0).sum() and last.sum == pytest.approx(density[density > 0].log10().sum().item())
    assert {(image.width, image.height) for image in written.Images("val/phi_tail")} == {(600, 400)}
    assert not plt.get_fignums()


def test_histograms_are_of_live_latents_and_of_each_rows_nearest(watched: tuple[JointSAE, Kept]):
    module, kept = watched
    density, rows = fired(module).mean(0), functional.unit_rows(module.primary.W_dec.detach())
    torch.testing.assert_close(kept.histograms["val/log10_density"][-1][1], density[density > 0].log10())
    nearest = (rows @ rows.T - 2 * torch.eye(48)).amax(1)
    torch.testing.assert_close(kept.histograms["decoder/nearest_cosine"][-1][1], nearest)


def test_the_tail_is_that_of_correlations_of_the_sampled_pairs(watched: tuple[JointSAE, Kept]):
    module, kept = watched
    dense, partner = fired(module), PhiSample(48).partner
    live = [i for i in range(48) if 0 < dense[:, i].sum() < len(dense)]
    pairs = [(low, int(high)) for row in partner for low, high in enumerate(row) if low in live and int(high) in live]
    found = torch.corrcoef(dense.T)[tuple(torch.tensor(pairs).T)].abs().numpy()
    curves = kept.curves("val/phi_tail")
    at, share = curves["pairs of latents"]
    # Not at the points where a pair lies but for rounding.
    apart = [i for i, x in enumerate(at) if abs(found - float(x)).min() > 1e-9]
    assert len(pairs) > 100 and len(apart) > 190
    assert [float(share[i]) for i in apart] == pytest.approx([(found > float(at[i])).mean() for i in apart])
    assert kept.figures["val/phi_tail"][-1][1].axes[0].get_title() == f"320 tokens, {48 - len(live)} of 48 latents dead"


@pytest.mark.parametrize("independent", [True, False])
def test_independent_latents_lie_on_the_curve_of_chance_and_others_do_not(independent: bool):
    draws, n = np.random.default_rng(3), 2000
    one, other = (torch.from_numpy(draws.integers(20, 400, 4000)) for _ in range(2))
    both = torch.from_numpy(draws.hypergeometric(one.numpy(), n - one.numpy(), other.numpy()))
    lines = {
        line.get_label(): np.asarray(line.get_ydata())
        for line in phi_tail_plot(both + (0 if independent else 20), one, other, n, title="").axes[0].lines
    }
    apart = abs(lines["pairs of latents"] - lines["independent, same counts"]).max()
    # Two empirical distributions of 4,000 lie 0.044 apart once in a thousand times (Kolmogorov and Smirnov).
    assert apart < 0.05 if independent else apart > 0.3
    # What chance expects in the mean is the area under its curve.
    expected = functional.phi_by_chance(one.double(), other.double(), float(n)).mean().item()
    assert np.trapezoid(lines["independent, same counts"], np.logspace(-5, 0, 201)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("shape", [(48, 16), (5, 9), (5000, 12)])
def test_the_spectrum_is_that_of_the_singular_values(shape: tuple[int, int], watched: tuple[JointSAE, Kept]):
    W_dec = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * torch.arange(1, shape[1] + 1)
    found = functional.spectrum(W_dec)
    expected = torch.linalg.svdvals(functional.unit_rows(W_dec))
    torch.testing.assert_close(found[: len(expected)], expected / expected.norm(), rtol=1e-9, atol=1e-7)
    assert found.square().sum().item() == pytest.approx(1) and (found[len(expected) :] < 1e-7).all()
    module, kept = watched
    ((number, values),) = kept.curves("decoder/spectrum").values()
    assert list(number) == list(range(1, 17))
    torch.testing.assert_close(torch.as_tensor(values), functional.spectrum(module.primary.W_dec.detach()))


def test_drawing_leaves_the_weights_bit_equal_and_nobody_to_draw_for_is_fine(tmp_path: Path, watched: tuple[JointSAE, Kept]):
    class Counting(Figures):
        samples = 0

        def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            super().on_validation_epoch_start(trainer, pl_module)
            Counting.samples += self._sample is not None

    for logger in (False, CSVLogger(tmp_path)):
        alone = fitted(tmp_path, Counting(), logger=logger)
        assert all(torch.equal(value, alone.state_dict()[name]) for name, value in watched[0].state_dict().items())
    assert Counting.samples == 0


def drawn(dense: Tensor, **more: Any) -> Kept:
    """A validation on these firings, without a run around it."""
    kept, callback = Kept(), Figures(matchings=2)
    epochs = SimpleNamespace(epoch_loop=SimpleNamespace(_batches_that_stepped=7))
    here = {"is_global_zero": True, "sanity_checking": False, "strategy": SimpleNamespace(broadcast=lambda value: value)}
    trainer = Mock(spec=Trainer, loggers=[SimpleNamespace(experiment=kept)], fit_loop=epochs, **{**here, **more})
    module = LightningModule()
    module.primary = SimpleNamespace(W_dec=torch.randn(dense.shape[1], 8, generator=torch.Generator().manual_seed(0)))  # type: ignore[assignment]
    callback.on_validation_epoch_start(trainer, module)
    callback.on_validation_batch_end(trainer, module, {"output": SimpleNamespace(codes=Codes.from_dense(dense))}, None, 0)
    callback.on_validation_epoch_end(trainer, module)
    return kept


def test_dead_latents_have_no_density_and_no_phi():
    assert set(drawn(torch.zeros(10, 6)).histograms) == {"decoder/nearest_cosine"} and set(drawn(torch.zeros(10, 6)).figures) == {
        "decoder/spectrum"
    }
    lone = torch.zeros(10, 6)
    lone[3, 2] = 1
    assert drawn(lone).histograms["val/log10_density"][0][1].tolist() == [-1.0]
    assert set(drawn(lone).figures) == {"decoder/spectrum"}


def firings() -> Tensor:
    return (torch.rand(600, 20, generator=torch.Generator().manual_seed(5)) < torch.linspace(0, 0.3, 20)).float()


@contextmanager
def meeting(rank: int, folder: str) -> Any:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    yield
    torch.distributed.destroy_process_group()


def from_rank_zero(value: Any) -> Any:
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def on_rank(rank: int, folder: str) -> None:
    with meeting(rank, folder):
        share = firings()[:250] if rank == 0 else firings()[250:]
        kept = drawn(share, is_global_zero=rank == 0, strategy=SimpleNamespace(broadcast=from_rank_zero))
    torch.save(summary(kept) if kept.figures else None, f"{folder}/{rank}.pt")


def summary(kept: Kept) -> Any:
    curve = kept.curves("val/phi_tail")["pairs of latents"][1]
    return kept.histograms["val/log10_density"][0][1].tolist(), [float(y) for y in curve]


def test_rank_zero_draws_what_all_ranks_counted(tmp_path: Path):
    on_two_ranks(on_rank, tmp_path)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [summary(drawn(firings())), None]


@pytest.mark.parametrize("name", ["quickstart", "gpt2_large_l20", "gemma2_9b_l23"])
def test_a_recipe_on_a_language_model_draws(name: str):
    callbacks = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["trainer"]["callbacks"]
    assert {"class_path": "Figures"} in callbacks

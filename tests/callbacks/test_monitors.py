"""Watching a run: what is logged is what the metrics say, and watching changes nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from metasae_lightning import JointSAE
from metasae_lightning.callbacks import HeldOut, PhiMonitor, Throughput
from metasae_lightning.metrics import Phi, PhiSample
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from tests.helpers.architectures import Batches, config

# lightning 2.6 flattens loaders with a check that torch 2.13 deprecates: https://github.com/Lightning-AI/pytorch-lightning, _pytree.py
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
STEPS = 30


def joint() -> JointSAE:
    return JointSAE(config("batchtopk"), config("batchtopk", 8), {"d": Decomposability(0.3)}, n_p=4, n_m=2, dead_after_tokens=256)


def fitted(folder: Path, *callbacks: Any, **more: Any) -> tuple[JointSAE, Trainer]:
    module = joint()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    run = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{"logger": False, **quiet, **more})
    run.fit(module, Batches(STEPS), Batches(3, 500))
    return module, run


def test_validating_and_logging_at_every_step_leaves_the_weights_bit_equal(tmp_path: Path):
    never, _ = fitted(tmp_path, limit_val_batches=0)
    callbacks = HeldOut(), PhiMonitor(every_tokens=64), Throughput(every_tokens=64)
    always, run = fitted(tmp_path, *callbacks, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1, val_check_interval=1)
    assert "val/fvu" in run.callback_metrics
    for (name, one), (_, two) in zip(never.state_dict().items(), always.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    written = (tmp_path / "metrics.csv").read_text()
    assert all(column in written for column in ("phi/excess", "throughput/tokens_per_second", "val/error_q4", "val/below_1e-05"))


def test_phi_is_estimated_over_its_window_and_begins_anew(tmp_path: Path):
    seen: list[Any] = []

    class Listener(PhiMonitor):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(outputs["output"].codes)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    _, run = fitted(tmp_path, Listener(every_tokens=640))
    expected = PhiSample(48)
    for codes in seen[20:]:  # the last of three windows of ten batches of 64
        expected.update(codes)
    found = {name.split("/")[1]: value.item() for name, value in run.callback_metrics.items() if name.startswith("phi/")}
    assert found == pytest.approx({name: value.item() for name, value in expected.compute().items()}, rel=1e-5)


def test_phi_on_test_tokens_is_exact(tmp_path: Path):
    module, _ = fitted(tmp_path)
    run = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[PhiMonitor()], enable_progress_bar=False)
    run.test(module, Batches(4, 900), verbose=False)
    expected = Phi(48)
    for batch in Batches(4, 900):
        expected.update(module.evaluate(Batch.of(batch)).codes)
    found = {name.split("/")[2]: value.item() for name, value in run.callback_metrics.items() if name.startswith("test/phi/")}
    assert found == pytest.approx({name: value.item() for name, value in expected.compute().items()}, rel=1e-5)


def test_throughput_is_tokens_over_the_time_they_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("metasae_lightning.callbacks.throughput.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    _, run = fitted(tmp_path, Throughput(every_tokens=320))
    # A step of 64 tokens looks at the clock once, a second later than the one before.
    assert run.callback_metrics["throughput/tokens_per_second"].item() == pytest.approx(64)
    assert run.callback_metrics["throughput/process_gib"].item() > 0.1

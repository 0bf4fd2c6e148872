"""Monitoring callbacks log the values of the metrics and do not change training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from metasae_lightning import ActivationsDataModule, JointSAE
from metasae_lightning.callbacks import HeldOut, PhiMonitor, Throughput
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.metrics import Phi, PhiSample
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from tests.helpers.architectures import Batches, config
from tests.helpers.models import Texts, documents, save_model

# lightning 2.6 flattens loaders with a check that torch 2.13 deprecates: https://github.com/Lightning-AI/pytorch-lightning, _pytree.py
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
STEPS = 30


def joint() -> JointSAE:
    return JointSAE(config("batchtopk"), config("batchtopk", 8), {"d": Decomposability(0.3)}, n_p=4, n_m=2, dead_after_tokens=256)


def quiet_trainer(folder: Path, *callbacks: Any, **changes: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    return Trainer(
        max_epochs=1, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **{"logger": False, **quiet, **changes}
    )


def fit_joint(folder: Path, *callbacks: Any, **changes: Any) -> tuple[JointSAE, Trainer]:
    module, trainer = joint(), quiet_trainer(folder, *callbacks, **changes)
    trainer.fit(module, Batches(STEPS), Batches(3, 500))
    return module, trainer


def test_validating_and_logging_at_every_step_leaves_the_weights_bit_equal(tmp_path: Path):
    unmonitored, _ = fit_joint(tmp_path, limit_val_batches=0)
    callbacks = HeldOut(), PhiMonitor(every_tokens=64), Throughput(every_tokens=64)
    monitored, trainer = fit_joint(
        tmp_path, *callbacks, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1, val_check_interval=1
    )
    assert "val/fvu" in trainer.callback_metrics
    for (name, value), (_, other) in zip(unmonitored.state_dict().items(), monitored.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    metrics_csv = (tmp_path / "metrics.csv").read_text()
    assert all(column in metrics_csv for column in ("phi/excess", "throughput/tokens_per_second", "val/error_q4", "val/below_1e-05"))


def test_phi_is_estimated_over_each_window_of_tokens_separately(tmp_path: Path):
    codes_by_step: list[Any] = []

    class RecordingPhiMonitor(PhiMonitor):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            codes_by_step.append(outputs["output"].codes)
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    _, trainer = fit_joint(tmp_path, RecordingPhiMonitor(every_tokens=640))
    expected = PhiSample(48)
    for codes in codes_by_step[20:]:  # the last of three windows of ten batches of 64
        expected.update(codes)
    logged = {name.split("/")[1]: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("phi/")}
    assert logged == pytest.approx({name: value.item() for name, value in expected.compute().items()}, rel=1e-5)


def test_phi_on_test_data_is_over_all_pairs(tmp_path: Path):
    module, _ = fit_joint(tmp_path)
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[PhiMonitor()], enable_progress_bar=False)
    trainer.test(module, Batches(4, 900), verbose=False)
    expected = Phi(48)
    for batch in Batches(4, 900):
        expected.update(module.evaluate(Batch.of(batch)).codes)
    logged = {name.split("/")[2]: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("test/phi/")}
    assert logged == pytest.approx({name: value.item() for name, value in expected.compute().items()}, rel=1e-5)


def test_throughput_is_tokens_divided_by_elapsed_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("metasae_lightning.callbacks.throughput.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    _, trainer = fit_joint(tmp_path, Throughput(every_tokens=320))
    # Each step of 64 tokens reads the clock once, and each reading is one second later than the last.
    assert trainer.callback_metrics["throughput/tokens_per_second"].item() == pytest.approx(64)
    assert trainer.callback_metrics["throughput/process_gib"].item() > 0.1
    # No language model runs and no text is read.
    model, text, sae, host = (trainer.callback_metrics[f"throughput/{name}"].item() for name in ("model", "text", "sae", "host"))
    assert model == text == 0 and 0.02 < sae < 0.98 and sae + host == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_the_shares_of_the_time_are_the_models_the_saes_the_texts_and_the_hosts(prefetch: int, tmp_path: Path):
    lm = HuggingFaceLM(str(save_model(tmp_path / "tiny", "llama", layers=2)), "blocks.1.hook_resid_post", device="cpu")
    sizes: dict[str, Any] = {
        "tokens": 16 * 40,
        "batch_size": 16,
        "context_size": 12,
        "buffer_size": 64,
        "forward_batch": 3,
        "held_out": 0.2,
    }
    data = ActivationsDataModule(lm, Texts(documents()), prefetch=prefetch, **sizes)
    trainer = quiet_trainer(tmp_path, Throughput(every_tokens=160), limit_val_batches=0)
    trainer.fit(JointSAE(config("batchtopk", d_in=32), None, {}), datamodule=data)
    shares = {name: trainer.callback_metrics[f"throughput/{name}"].item() for name in ("model", "sae", "text", "host")}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert shares["model"] > 0.02 and shares["sae"] > 0.02 and min(shares.values()) >= 0


def test_shares_are_logged_when_the_gpu_has_come_to_the_end_of_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    logged: list[tuple[int, dict[str, float]]] = []
    events, is_past = [0.0], 0.0

    class Event:
        """An event one second after the last; the GPU has come to those up to `is_past`."""

        def __init__(self, **_: Any) -> None: ...

        def record(self, cuda_stream: Any) -> None:
            events[0] += 1
            self.time = events[0]

        def query(self) -> bool:
            return self.time <= is_past

        def elapsed_time(self, later: Any) -> float:
            assert later.query(), "the host would wait"
            return 1000 * (later.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    trainer = quiet_trainer(tmp_path)
    module = SimpleNamespace(device=torch.device("cuda", 0), rows_seen=0, log_dict=lambda values: logged.append((step, values)))
    throughput, step = Throughput(every_tokens=128), 0
    throughput.on_train_start(trainer, module)
    for step in range(8):
        # At step 5 the GPU has come to the step's end of the first interval, and not to those of the model and the text.
        is_past = {5: 8.0, 6: 10.0}.get(step, is_past)
        throughput.on_train_batch_start(trainer, module, None, step)
        module.rows_seen += 64
        throughput.on_train_batch_end(trainer, module, None, None, step)
    assert [step for step, values in logged if "throughput/sae" in values] == [6]
    assert [step for step, values in logged if "throughput/tokens_per_second" in values] == [1, 3, 5, 7]
    shares = next(values for _, values in logged if "throughput/sae" in values)
    # The first interval has the events 1 (its beginning), 4 to 5 and 6 to 7 (steps) and 8 (its end).
    assert shares == pytest.approx({"throughput/model": 0, "throughput/sae": 2 / 7, "throughput/text": 0, "throughput/host": 5 / 7})

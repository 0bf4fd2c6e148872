"""Callbacks that look at a step or a batch without a wait for the device."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from metasae_lightning import SyntheticDataModule
from metasae_lightning.callbacks import Export, TokenProgress
from metasae_lightning.callbacks import token_progress as module
from metasae_lightning.data.synthetic import SyntheticModelConfig
from metasae_lightning.penalties import Decomposability
from metasae_lightning.training import JointSAE, SideBySide
from tests.helpers.architectures import config
from tests.helpers.device_calls import DeviceCalls

QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}


class Copied(torch.Tensor):
    """A tensor that notes how it is copied."""

    copies: ClassVar[list[bool]] = []

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        Copied.copies.append(kwargs.get("non_blocking", False))
        return super().to(*args, **kwargs).as_subclass(torch.Tensor)

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.to("cpu")


def test_export_stores_activations_without_a_wait_a_batch_and_waits_after_the_last():
    export, trainer, run = Export(calibration_tokens=7), Trainer(**QUIET), LightningModule()
    Copied.copies.clear()
    x = torch.arange(8.0).view(4, 2)
    for number in range(3):
        output = SimpleNamespace(activations=x.as_subclass(Copied))
        export.on_validation_batch_end(trainer, run, {"output": output}, None, number)
    assert Copied.copies == [True, True]  # eight tokens are enough
    with DeviceCalls() as calls:
        export.on_validation_epoch_end(trainer, run)
    assert calls.counts["zeros"] == 1 and torch.equal(torch.cat(export._samples), torch.cat([x, x]))


def test_progress_without_a_terminal_reads_a_step_for_each_line_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    described: list[str] = []
    monkeypatch.setattr(module, "describe", lambda output: described.append(output) or f"step {output}")
    monkeypatch.setattr(Trainer, "is_last_batch", property(lambda trainer: number == 3))
    trainer, run = Trainer(**QUIET), SimpleNamespace(rows_seen=5)
    progress = TokenProgress(every=1, line_seconds=1000.0)
    progress.on_train_start(trainer, run)
    for number in range(4):
        progress.on_train_batch_end(trainer, run, {"output": f"{number}"}, None, number)
    assert described == ["3"] and capsys.readouterr().err == "5 tokens, 0/s, step 3\n"


# The only meta phase of a sequential run takes minutes.
@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_the_steps_of_a_long_meta_phase(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    arms = {
        "a": JointSAE(config("topk", d_in=64), config("topk", d_in=64, d_sae=12), {"d": Decomposability(0.0)}, n_p=100, n_m=3),
        "b": JointSAE(config("topk", d_in=64)),
    }
    data = SyntheticDataModule(SyntheticModelConfig(num_features=16, hidden_dim=64, seed=0), tokens=1024, batch_size=512)
    progress = TokenProgress(line_seconds=0.0)
    run = Trainer(
        **{**QUIET, "enable_progress_bar": True}, default_root_dir=tmp_path, callbacks=[progress], max_epochs=1, limit_val_batches=0
    )
    run.fit(SideBySide(arms), datamodule=data)
    error = capsys.readouterr().err
    for step in (1, 2, 3):
        assert (f"a meta step {step} of 3" if terminal else f"1,024 tokens, a meta step {step} of 3\n") in error
    assert error.count("meta step") == 3 and not progress._hooks

"""Callbacks that look at a step or a batch without a wait for the device."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from metasae_lightning.callbacks import Export, TokenProgress
from metasae_lightning.callbacks import token_progress as module
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

"""A finished run goes on to a larger budget, and equals a run that had it from the start; a budget that is used up is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim import Adam

from metasae_lightning.callbacks import Checkpoints, Export, HeldOut
from metasae_lightning.cli import main
from metasae_lightning.data import SyntheticDataModule
from metasae_lightning.data.synthetic import SyntheticModelConfig
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability
from metasae_lightning.schedules import WarmupDecay
from metasae_lightning.training import JointSAE, SideBySide
from metasae_lightning.training.checkpoint_files import AtomicCheckpointIO
from metasae_lightning.training.larger_budget import LargerBudget
from tests.helpers.architectures import D_IN, config

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
BATCH = 64


def joint(weight: float = 0.3, **options: Any) -> JointSAE:
    return JointSAE(config("batchtopk"), config("topk", d_sae=8), {"d": Decomposability(weight)}, n_p=3, n_m=2, **options)


def solo(**options: Any) -> JointSAE:
    return JointSAE(config("batchtopk"), **options)


def three_arms() -> SideBySide:
    return SideBySide({"solo": solo(), "joint": joint(), "strong": joint(3.0)})


def fit(folder: Path, module: Any, batches: int, *, checkpoint: Path | None = None, callbacks: tuple[Callback, ...] = ()) -> dict[str, Any]:
    data = SyntheticDataModule(
        SyntheticModelConfig(num_features=32, hidden_dim=D_IN, seed=0),
        tokens=BATCH * batches,
        batch_size=BATCH,
        validation_tokens=2 * BATCH,
    )
    trainer = Trainer(
        default_root_dir=folder, accelerator="cpu", max_epochs=1, plugins=[AtomicCheckpointIO()], logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[LargerBudget(), HeldOut(), *callbacks, Checkpoints()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    moments = [entry for optimizer in state["optimizer_states"] for entry in optimizer["state"].values()]
    tensors = {f"{number} {key}": torch.as_tensor(value) for number, entry in enumerate(moments) for key, value in entry.items()}
    return {**state["state_dict"], **tensors, "steps": torch.tensor(state["global_step"])}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("make", [solo, joint, three_arms])
def test_a_finished_run_with_a_larger_budget_equals_the_longer_run(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = fit(tmp_path / "long", make(), 12)
    first = fit(tmp_path / "run", make(), 6)
    assert differing(first, expected)
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert not differing(fit(tmp_path / "run", make(), 12, checkpoint=checkpoint), expected)
    assert capsys.readouterr().err == "metasae: the finished run of 384 tokens goes on: 6 of 12 batches\n"


def test_a_macro_step_that_ended_early_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    expected = fit(tmp_path / "long", joint(), 12)
    fit(tmp_path / "run", joint(), 7)
    capsys.readouterr()
    assert differing(fit(tmp_path / "run", joint(), 12, checkpoint=tmp_path / "run" / "checkpoints" / "last.ckpt"), expected)
    assert "; the meta SAE has taken the steps at the end of the first budget" in capsys.readouterr().err


@pytest.mark.parametrize("batches", [6, 4])
def test_an_equal_or_smaller_budget_is_refused(batches: int, tmp_path: Path):
    fit(tmp_path, solo(), 6)
    with pytest.raises(InputError, match=r"tokens: the run has read its budget of 384 tokens: set a larger one to go on"):
        fit(tmp_path, solo(), batches, checkpoint=tmp_path / "checkpoints" / "last.ckpt")


class RecordRates(Callback):
    """Records the learning rate at each step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_schedule_goes_on_as_that_of_the_longer_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def decaying() -> JointSAE:
        return solo(primary_optimizer=lambda parameters: Adam(parameters, lr=1.0), primary_scheduler=lambda o: WarmupDecay(o, decay=0.5))

    fit(tmp_path / "run", decaying(), 6)
    long, rest = RecordRates(), RecordRates()
    fit(tmp_path / "long", decaying(), 12, callbacks=(long,))
    capsys.readouterr()
    fit(tmp_path / "run", decaying(), 12, checkpoint=tmp_path / "run" / "checkpoints" / "last.ckpt", callbacks=(rest,))
    assert rest.rates == long.rates[6:] and rest.rates[:2] == [1.0, pytest.approx(5 / 6)]
    assert "; WarmupDecay goes on as in a run of 12 steps, from 0 to 1\n" in capsys.readouterr().err


def test_the_first_export_stays_under_its_token_count(tmp_path: Path):
    def training_tokens(folder: Path) -> int:
        return json.loads((folder / "cfg.json").read_text())["metadata"]["training_tokens"]

    fit(tmp_path, three_arms(), 6, callbacks=(Export(),))
    saes = [tmp_path / "arms" / arm / "saes" for arm in ("solo", "joint", "strong")]
    first = [(folder / "primary" / "sae_weights.safetensors").read_bytes() for folder in saes]
    fit(tmp_path, three_arms(), 9, checkpoint=tmp_path / "checkpoints" / "last.ckpt", callbacks=(Export(),))
    assert [(folder / "tokens=384" / "primary" / "sae_weights.safetensors").read_bytes() for folder in saes] == first
    assert [training_tokens(folder / "tokens=384" / "primary") for folder in saes] == [384] * 3
    assert [training_tokens(folder / "primary") for folder in saes] == [576] * 3
    assert (saes[1] / "tokens=384" / "meta" / "cfg.json").exists()


def test_the_command_goes_on_to_a_larger_budget_and_refuses_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def command(tokens: int, *more: str) -> int:
        sizes = ["--data.init_args.validation_tokens=512", "--data.init_args.batch_size=512", f"--data.init_args.tokens={tokens}"]
        return main(["fit", "-c", "synthetic", "--run", str(tmp_path / "run"), *sizes, *more])

    assert command(2048) == 0
    for tokens in (2048, 1024):
        capsys.readouterr()
        assert command(tokens, "--ckpt_path", "last") == 2
        assert re.search(r"^metasae: error: .*tokens: the run has read its budget of 2,048 tokens", capsys.readouterr().err, re.MULTILINE)
    assert command(4096, "--ckpt_path", "last") == 0
    stderr = capsys.readouterr().err
    assert "data.init_args.tokens: 2048 then, 4096 now" in stderr and "goes on: 4 of 8 batches; WarmupDecay" in stderr
    records = [json.loads((tmp_path / "run" / f"evaluation{of}.json").read_text()) for of in (".tokens=2048", "")]
    assert [record["validation"]["tokens"] for record in records] == [2048, 4096]

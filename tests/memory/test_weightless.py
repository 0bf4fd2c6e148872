"""`metasae fit` plans memory with a model without weights, and then builds the same model as without a plan."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metasae_lightning import JointSAE
from metasae_lightning.cli import main
from metasae_lightning.cli.lightning_cli import MetasaeCLI, MetasaeTrainer
from metasae_lightning.cli.saved_config import SaveConfigOnFirstBatch
from metasae_lightning.memory.weightless import is_weightless
from metasae_lightning.sae.learner import Learner
from tests.helpers.architectures import ARCHITECTURES, config

# lightning 2.6 passes `skip_none`, which jsonargparse 4.53 deprecates: https://github.com/Lightning-AI/pytorch-lightning
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")


# A thousand million latents need terabytes: building the SAE before the plan would be an error of the allocator.
@pytest.mark.parametrize(
    ("arguments", "item_and_remedy"),
    [
        (["--model.init_args.primary.init_args.d_sae", "999999999"], "primary SAE .* (lower primary.d_sae)"),
        (["--model.init_args.meta.init_args.d_sae", "999999999"], "meta SAE .* (lower meta.d_sae)"),
        (["--arms", "{small: {}, large: {primary.init_args.d_sae: 999999999}}"], "large: primary SAE .* (lower primary.d_sae)"),
    ],
    ids=["primary", "meta", "arm"],
)
def test_an_sae_larger_than_the_memory_is_refused_in_one_line(
    arguments: list[str], item_and_remedy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["fit", "-c", "synthetic", "--run", str(tmp_path / "run"), *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("metasae: error: memory: the run needs at least ") and "GiB on cpu, and" in line
    name, remedy = item_and_remedy.split(" .* ")
    assert f"Largest: {name} " in line and remedy in line
    assert not (tmp_path / "run").exists()


def model_to_train(run: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, torch.Tensor]:
    """The model and the trainer that `metasae fit` trains with, and the state of torch's random numbers at that time."""
    calls: list[tuple[Any, Any, torch.Tensor]] = []
    monkeypatch.setattr(MetasaeTrainer, "fit", lambda trainer, model, **_: calls.append((model, trainer, torch.random.get_rng_state())))
    arms = "{solo: {meta: null, penalties: {}}, joint: {}}"
    assert main(["fit", "-c", "synthetic", "--run", str(run), "--arms", arms]) == 0
    return calls[0]


def test_the_model_has_the_same_weights_as_without_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, trainer, rng_state = model_to_train(tmp_path / "run", monkeypatch)
    monkeypatch.setattr(MetasaeCLI, "_instantiate_weightless", lambda cli: cli.parser.instantiate_classes(cli.config))
    expected, _, expected_rng_state = model_to_train(tmp_path / "run", monkeypatch)
    assert not is_weightless(model)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(rng_state, expected_rng_state)
    (saved,) = [callback.config for callback in trainer.callbacks if isinstance(callback, SaveConfigOnFirstBatch)]
    assert "'meta'" not in str([arm.init_args.primary.init_args.device for arm in saved.model.init_args.arms.values()])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_can_be_built_without_weights(name: str):
    model = JointSAE(config(name, device="meta"))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_an_architecture_that_reads_its_weights_is_built_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    renormalize = Learner._renormalize

    def read_weights(self: Learner) -> None:
        assert self.W_dec.sum().item() is not None
        renormalize(self)

    monkeypatch.setattr(Learner, "_renormalize", read_weights)
    model, _, _ = model_to_train(tmp_path / "run", monkeypatch)
    assert not is_weightless(model)

"""Every architecture of this package in every part of it: ranks, resuming, and the commands of the command line."""

import copy
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE, TrainingSAEConfig
from torch import Tensor
from torch.optim import Adam

from metasae_lightning import architectures
from metasae_lightning.architectures import Units
from metasae_lightning.cli import main
from metasae_lightning.compute.process_group import SINGLE, ProcessGroup
from metasae_lightning.heads import InteractionHead
from metasae_lightning.objectives import Objective
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch, Contexts
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import D_IN, activations, config
from tests.helpers.ranks import in_process_group

D_SAE, STEPS = 48, 12
# For each case: the name of its config class, arguments of the config, arguments of JointSAE.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "subspace": ("Subspace", {"group_size": 4, "k": 2}, {}),
    "subspace, whole batch": ("Subspace", {"group_size": 4, "k": 2, "batch_top": True}, {}),
    "paper_gated": ("PaperGated", {"l1_coefficient": 0.1}, {}),
    "signed_gated": ("SignedGated", {"l1_coefficient": 0.1}, {}),
    "adaptive_elastic_net": ("AdaptiveElasticNet", {"l1_coefficient": 0.1, "l2_coefficient": 0.05, "weight_ramp_steps": 5}, {}),
    "sparsemax": ("Sparsemax", {"rate_decay": 0.9}, {"decoder_rows": "free"}),
}


def primary(case: str, **sizes: int) -> TrainingSAEConfig:
    name, arguments, _ = CASES[case]
    return getattr(architectures, f"{name}TrainingSAEConfig")(**{"d_in": D_IN, "d_sae": D_SAE, **sizes}, **arguments)


def joint(case: str) -> JointSAE:
    arguments = {"n_p": 3, "n_m": 2, "dead_after_tokens": 64, **CASES[case][2]}
    module = JointSAE(primary(case), config("batchtopk", d_sae=12), {"d": Decomposability(0.3)}, **arguments)
    return module.double()


def adams(module: JointSAE) -> tuple[Adam, Adam]:
    assert module.meta is not None
    return Adam(module.primary.parameters(), lr=1e-3), Adam(module.meta.parameters(), lr=1e-3)


def train(case: str, ranks: ProcessGroup) -> dict[str, Any]:
    """Train on this rank's half of each batch: the state, and the mask of dead units after each step."""
    module = joint(case)
    module.join(ranks)
    optimizers, dead = adams(module), []
    for step in range(STEPS):
        rows = activations(step).double()
        module.step(Batch(rows[ranks.even_slice(len(rows))]), *optimizers, last=step == STEPS - 1)
        dead.append(module.primary.dead)
    return {"state": module.state_dict(), "dead": torch.stack(dead)}


def train_all(rank: int, folder: str) -> None:
    torch.save({case: train(case, ProcessGroup.default()) for case in CASES}, f"{folder}/{rank}.pt")


@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_two_ranks_train_as_one_process(tmp_path: Path):
    in_process_group(2, train_all, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for case in CASES:
        expected = train(case, SINGLE)
        for name, tensor in expected["state"].items():
            if name.endswith(("step_sums", "step_rows")):  # means over ranks, of which the elastic net uses the quotient alone
                continue
            assert torch.equal(first[case]["state"][name], second[case]["state"][name]), f"{case}: {name} differs between ranks"
            torch.testing.assert_close(
                first[case]["state"][name], tensor, rtol=1e-8, atol=1e-10, msg=lambda text, n=name, c=case: f"{c}, {n}: {text}"
            )
        assert torch.equal(first[case]["dead"], expected["dead"]), case


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_training_equals_one_that_never_stopped(case: str):
    whole, first = joint(case), joint(case)
    of_whole, of_first = adams(whole), adams(first)
    for step in range(STEPS):
        whole.step(Batch(activations(step).double()), *of_whole)
    for step in range(STEPS // 2):
        first.step(Batch(activations(step).double()), *of_first)
    resumed = joint(case)
    of_resumed = adams(resumed)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, saved in zip(of_resumed, of_first, strict=True):
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
    before = {name: tensor.clone() for name, tensor in resumed.state_dict().items()}
    for step in range(STEPS // 2, STEPS):
        resumed.step(Batch(activations(step).double()), *of_resumed)
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    assert not torch.equal(
        before["primary.sae.W_enc" if case != "sparsemax" else "primary.sae.C"],
        dict(resumed.state_dict())["primary.sae.W_enc" if case != "sparsemax" else "primary.sae.C"],
    )


@dataclass(frozen=True)
class LengthOfReconstruction(Objective):
    """An objective without a language model: the mean squared length of the reconstruction."""

    def check(self, data: Any) -> None: ...

    def use(self, model: Any) -> None: ...

    def loss(self, reconstruction: Tensor, contexts: Contexts) -> tuple[Tensor, dict[str, Tensor]]:
        return reconstruction.square().sum(-1).mean(), {}


@pytest.mark.parametrize("case", CASES)
def test_it_trains_with_a_head_and_with_an_objective(case: str):
    rows = activations(0).double()
    contexts = Contexts(torch.zeros(1, len(rows), dtype=torch.long), torch.arange(len(rows)))
    decoders: dict[str, Tensor] = {}
    for name, arguments in {
        "plain": {},
        "head": {"head": InteractionHead(rank=3, hidden=None)},
        "objective": {"objective": LengthOfReconstruction()},
    }.items():
        module = JointSAE(primary(case), **CASES[case][2], **arguments).double()
        optimizer = Adam(module.primary.parameters(), lr=1e-2)
        for _ in range(3):
            output = module.step(Batch(rows, contexts=contexts), optimizer)
        decoders[name] = module.primary.W_dec.detach()
        assert output.loss.isfinite()
    # Each changes what is learned; a reconstruction of small length is no reconstruction of the rows.
    assert not torch.equal(decoders["plain"], decoders["head"]) and not torch.equal(decoders["plain"], decoders["objective"])


def overlay(case: str, folder: Path) -> str:
    """An overlay of the synthetic recipe with this primary, as a file."""
    name, arguments, of_module = CASES[case]
    sae = {"class_path": f"metasae_lightning.architectures.{name}TrainingSAEConfig", "init_args": {"d_in": 64, "d_sae": 128, **arguments}}
    path = folder / "primary.yaml"
    path.write_text(yaml.safe_dump({"model": {"init_args": {"primary": sae, **of_module}}}))
    return str(path)


@pytest.mark.parametrize("case", CASES)
def test_the_commands_train_measure_compare_continue_and_publish_it(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run, again, out = tmp_path / "run", tmp_path / "again", tmp_path / "published"
    sizes = {"tokens": 65536, "validation_tokens": 4096, "test_tokens": 4096}
    short = [*(f"--data.{name}={value}" for name, value in sizes.items()), "--model.primary_optimizer.lr=0.01"]
    recipe = ["fit", "-c", "synthetic", "-c", overlay(case, tmp_path), *short]
    assert main([*recipe, "--run", str(run)]) == 0
    measured = ["--tokens", "4096", "--critic_seeds", "1", "--critic_steps", "20", "--resamples", "5"]
    assert main(["test", str(run), *measured]) == 0
    entry = json.loads((run / "evaluation.json").read_text())["evaluation"]["figures"]
    sae: Any = SAE.load_from_disk(run / "saes" / "primary")
    units = Units.of(sae.cfg)
    # The figure counts units: with groups at most k, and never more than there are.
    l0 = entry["reconstruction"]["l0"]
    assert 0 < l0 <= units.count and (not case.startswith("subspace") or abs(l0 - 2) < 0.5)
    # A run that starts from this SAE begins at its quality: the exported SAE and the one made from it have equal FVU.
    assert main([*recipe, "--run", str(again), "--model.init_from", str(run)]) == 0
    source_fvu, own_fvu = map(float, re.findall(r"FVU ([\d.]+) -> ([\d.]+), L0", caplog.text)[-1])
    assert own_fvu == pytest.approx(source_fvu, rel=0.02)
    assert main(["compare", str(run), str(again), *measured, "--splice_tokens", "0"]) == 0
    assert main(["report", str(run)]) == 0 and (run / "report.html").is_file()
    assert main(["publish", str(run), str(out)]) == 0
    published: Any = SAE.load_from_disk(next(out.rglob("cfg.json")).parent)
    x = activations(0, d_in=64)
    torch.testing.assert_close(published.encode(x), sae.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(published(x), sae(x), rtol=1e-5, atol=1e-5)

"""Heads on codes: the formula, what a head changes in training, and what it finds on planted data."""

import re
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import TopKTrainingSAEConfig
from torch import Tensor
from torch.optim import Adam

from metasae_lightning import functional
from metasae_lightning.compute.process_group import SINGLE, ProcessGroup
from metasae_lightning.errors import InputError
from metasae_lightning.heads import InteractionHead
from metasae_lightning.memory import measure
from metasae_lightning.objectives import EndToEnd
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.sae.head_loss import HeadTraining, add_head
from metasae_lightning.step import Batch, Codes, ReconstructionLoss, StepOutput
from metasae_lightning.training import JointSAE
from metasae_lightning.training.argument_checks import check_head, check_init_from, check_trainer
from metasae_lightning.training.strategy import Sharded
from tests.helpers import judged
from tests.helpers.architectures import ARCHITECTURES, activations, config, optimizers
from tests.helpers.ranks import in_process_group

pytestmark = pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")


def module(
    architecture: str = "batchtopk", training: HeadTraining | None = "joint", cfg: dict[str, Any] | None = None, **kw: Any
) -> JointSAE:
    """A solo SAE with a small head, or without one where `training` is None."""
    head: dict[str, Any] = {} if training is None else {"head": InteractionHead(4, 8), "head_training": training}
    return JointSAE(config(architecture, **(cfg or {})), **{"dead_after_tokens": 320, **head, **kw})


def train(joint: JointSAE, steps: int = 8, lr: float = 1e-2) -> list[StepOutput]:
    trained = optimizers(joint, lr)
    return [joint.step(Batch(activations(i)), *trained) for i in range(steps)]


def of_sae(joint: JointSAE) -> dict[str, Tensor]:
    """The primary's state without the head's."""
    return {name: tensor.clone() for name, tensor in joint.primary.state_dict().items() if not name.startswith("head.")}


def test_interactions_equal_the_sum_over_all_pairs():
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(7, 12, generator=generator, dtype=torch.float64) * (torch.rand(7, 12, generator=generator) < 0.4)
    acts[3] = 0
    V, codes = torch.randn(12, 5, generator=generator, dtype=torch.float64), Codes.from_dense(acts)
    u = functional.pairwise_interactions(codes.latents, codes.values, codes.lengths(), V)
    pairs = [sum((f[i] * f[j] * V[i] * V[j] for i, j in combinations(range(12), 2)), torch.zeros(5).double()) for f in acts]
    torch.testing.assert_close(u, torch.stack(pairs), rtol=1e-12, atol=1e-12)
    assert (u[3] == 0).all() and (u < 0).any() and (u > 0).any()


def test_the_first_codes_set_the_scale_of_the_interactions():
    head = InteractionHead(3, None)
    head.build(6, 2)
    codes = Codes.from_dense(100 * torch.rand(50, 6))
    head.initialize(codes)
    seen = list[Tensor]()
    head.map.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert (head(codes) == 0).all()
    assert seen[0].square().mean().item() == pytest.approx(1, rel=1e-5)
    head.initialize(Codes.from_dense(torch.eye(6)))  # no row has two active latents
    assert head.scale == 1


@pytest.mark.parametrize("training", ["joint", "detached"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_untrained_head_changes_no_bit_of_the_first_step(architecture: str, training: Any):
    without, with_head = module(architecture, None), module(architecture, training)
    (expected,), (output,) = train(without, 1), train(with_head, 1)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.primary.fvu, expected.primary.fvu)
    assert expected.primary.head_fvu is None and output.primary.losses["head_loss"] == 0
    torch.testing.assert_close(output.primary.head_fvu, expected.primary.fvu)
    for name, tensor in of_sae(without).items():
        assert torch.equal(of_sae(with_head)[name], tensor), name
    assert with_head.primary.head.map[2].weight.abs().max() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "matryoshka_batchtopk", "jumprelu", "abstopk"])
def test_an_sae_with_a_detached_head_is_bit_equal_to_one_without(architecture: str):
    arms = {training: module(architecture, training, clip_grad_norm=0.5, micro_batches=2) for training in (None, "detached", "joint")}
    for arm in arms.values():
        train(arm)
    expected = of_sae(arms[None])
    assert all(torch.equal(of_sae(arms["detached"])[name], tensor) for name, tensor in expected.items())
    # Control: trained jointly, the SAE is another.
    assert not torch.equal(of_sae(arms["joint"])["sae.W_dec"], expected["sae.W_dec"])


def restated_loss(joint: Any, x: Tensor, codes: Codes) -> Tensor:
    """`||xhat + h - x||^2` with dense matrices and every pair written out, for the active latents of `codes`."""
    sae, head = joint.primary.sae, joint.primary.head
    mask = torch.zeros(codes.shape, dtype=torch.bool).index_put((codes.rows, codes.latents), torch.tensor(True))
    origin = sae.b_dec if sae.cfg.apply_b_dec_to_input else 0
    acts = ((x - origin) @ sae.W_enc + sae.b_enc) * mask
    f = acts * sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else acts
    first, last = head.map[0], head.map[2]
    i, j = torch.triu_indices(f.shape[1], f.shape[1], 1)
    u = (f[:, i] * f[:, j]) @ (head.embeddings[i] * head.embeddings[j]) / head.scale
    output = (u @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T
    return (acts @ sae.W_dec + sae.b_dec + output - x).square().sum(-1).mean()


@pytest.mark.parametrize(
    ("architecture", "cfg"),
    [
        ("batchtopk", {"rescale_acts_by_decoder_norm": False}),
        ("batchtopk", {"rescale_acts_by_decoder_norm": True}),
        ("topk", {"rescale_acts_by_decoder_norm": True}),
        ("abstopk", {"rescale_acts_by_decoder_norm": False}),
    ],
)
def test_joint_gradients_equal_autograd_on_a_dense_restatement(architecture: str, cfg: dict[str, Any]):
    joint = module(architecture, "joint", {**cfg, "dtype": "float64"}, decoder_rows="free").double()
    train_once = optimizers(joint)[0]
    joint.step(Batch(activations(0).double()), train_once)
    with torch.no_grad():
        joint.primary.head.map[2].weight.normal_(std=0.3)  # type: ignore[union-attr, operator, index]
        joint.primary.sae.W_dec.mul_(torch.linspace(0.5, 2, 48)[:, None])
    x = activations(1).double()
    joint.zero_grad()
    gradients = joint.primary.compute_gradients(x, count=len(x), backward=Tensor.backward)
    (result,) = gradients.results
    computed = {name: parameter.grad for name, parameter in joint.primary.named_parameters()}
    joint.zero_grad()
    loss = restated_loss(joint, x, result.codes)
    loss.backward()
    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-9, atol=0)
    assert result.losses["head_loss"].abs() > 0.01 * loss
    for name, parameter in joint.primary.named_parameters():
        assert computed[name] is not None and parameter.grad is not None, name
        torch.testing.assert_close(computed[name], parameter.grad, rtol=1e-9, atol=1e-9, msg=name)


def planted_batch(step: int, interactions: float) -> Tensor:
    """Three of 12 features a row along axes 0 to 11, noise, and `sum_(i<j) f_i f_j e_ij` in four more axes, with `e_ij` of rank 2."""
    generator = torch.Generator().manual_seed(step)
    active = torch.rand(512, 12, generator=generator).topk(3).indices
    f = torch.zeros(512, 12).scatter(1, active, 0.5 + torch.rand(512, 3, generator=generator))
    fixed = torch.Generator().manual_seed(77)
    a, E = torch.randn(12, 2, generator=fixed), torch.randn(2, 4, generator=fixed)
    u = ((f @ a).square() - f.square() @ a.square()) / 2
    return torch.cat([f, interactions * u @ E], 1) + 0.1 * torch.randn(512, 16, generator=generator)


def planted_fvus(interactions: float) -> tuple[float, float]:
    """Mean FVU over the last steps without and with a detached head, of an SAE that starts at the true features and learns slowly."""
    cfg = TopKTrainingSAEConfig(d_in=16, d_sae=12, k=3, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=False)
    joint = JointSAE(cfg, head=InteractionHead(4, 32), head_training="detached", b_dec_init="zeros")
    with torch.no_grad():
        joint.primary.sae.W_dec.copy_(torch.eye(12, 16))
        joint.primary.sae.W_enc.copy_(torch.eye(12, 16).T)
    parts = [(joint.primary.sae, 1e-4), (joint.primary.head, 1e-2)]
    optimizer = Adam([{"params": list(part.parameters()), "lr": lr} for part, lr in parts if part is not None])
    outputs = [joint.step(Batch(planted_batch(step, interactions)), optimizer) for step in range(200)][-20:]
    without = torch.stack([output.primary.fvu for output in outputs]).mean().item()
    with_head = torch.stack([output.scalars()["head/fvu"] for output in outputs]).mean().item()
    return without, with_head


def test_a_head_finds_planted_interactions_and_nothing_where_there_are_none():
    without, with_head = planted_fvus(interactions=0.3)
    assert with_head < 0.2 * without, (without, with_head)
    without, with_head = planted_fvus(interactions=0.0)
    assert with_head > 0.95 * without, (without, with_head)


def test_a_head_on_a_frozen_sae_changes_no_bit_of_the_sae(tmp_path: Path):
    judged.sae(threshold=0.5).save_model(tmp_path / "source")
    cfg = config("batchtopk", d_in=judged.D_IN, rescale_acts_by_decoder_norm=False)
    joint = JointSAE(cfg, head=InteractionHead(4, 8), head_training="frozen_sae", init_from=str(tmp_path / "source"), clip_grad_norm=1.0)
    check_init_from(joint)
    trained, outputs, first = optimizers(joint, lr=1e-2), list[StepOutput](), dict[str, Tensor]()
    for i in range(10):
        outputs.append(joint.step(Batch(activations(i, d_in=judged.D_IN)), *trained))
        if i == 0:
            first = of_sae(joint)
    source = judged.sae(threshold=0.5)
    torch.testing.assert_close(first["sae.W_dec"], source.W_dec.detach(), rtol=1e-6, atol=1e-6)
    assert all(torch.equal(of_sae(joint)[name], tensor) for name, tensor in first.items() if name.startswith("sae."))
    assert joint.primary.updates == 0 and joint.primary.steps == 10
    assert outputs[-1].primary.losses["head_loss"] < 0
    # Control: with the same first weights, training apart changes the SAE.
    control = JointSAE(cfg, head=InteractionHead(4, 8), head_training="detached", init_from=str(tmp_path / "source"))
    check_init_from(control)
    trained = optimizers(control, lr=1e-2)
    for i in range(2):
        control.step(Batch(activations(i, d_in=judged.D_IN)), *trained)
    assert not torch.equal(of_sae(control)["sae.W_dec"], first["sae.W_dec"])


def test_an_objective_of_the_sum_takes_the_place_of_the_squared_error_of_the_sum():
    y, h, z = (torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    losses = {"mse_loss": (y - z).square().sum(-1).mean(), "auxiliary_reconstruction_loss": torch.tensor(0.25)}
    result = ForwardResult(sum(losses.values()), losses, Codes.from_dense(y), lambda: y, lambda: y, lambda: Codes.from_dense(y))  # type: ignore[arg-type]

    class Fixed(torch.nn.Module):
        def forward(self, codes: Codes) -> Tensor:
            return h

    class Total(ReconstructionLoss):
        def __call__(self, reconstruction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return reconstruction.sum(), {"kl": reconstruction.sum()}

        def split(self, count: int) -> list[tuple[slice, ReconstructionLoss]]:
            raise NotImplementedError

    joint, detached = (add_head(result, Fixed(), z, training) for training in ("joint", "detached"))
    torch.testing.assert_close(joint.loss, (y + h - z).square().sum(-1).mean() + 0.25)
    torch.testing.assert_close(joint.with_objective(Total(), lambda rows: rows).loss, (y + h).sum() + 0.25)
    expected = y.sum() + 0.25 + (y + h - z).square().sum(-1).mean() - (y - z).square().sum(-1).mean()
    torch.testing.assert_close(detached.with_objective(Total(), lambda rows: rows).loss, expected)


def test_a_resumed_run_equals_one_that_never_stopped():
    whole, half, resumed = (module("batchtopk", "joint", clip_grad_norm=1.0) for _ in range(3))
    train(whole, 8)
    trained = optimizers(half, 1e-2)
    for i in range(4):
        half.step(Batch(activations(i)), *trained)
    again = optimizers(resumed, 1e-2)
    resumed.load_state_dict(half.state_dict())
    again[0].load_state_dict(trained[0].state_dict())
    for i in range(4, 8):
        resumed.step(Batch(activations(i)), *again)
    assert any(name.startswith("primary.head.") for name in whole.state_dict())
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def train_in_float64(ranks: ProcessGroup) -> dict[str, Any]:
    """The state after six steps on a rank's share of the rows, and what the last step logs."""
    joint = module("batchtopk", "joint", {"dtype": "float64"}, clip_grad_norm=0.5).double()
    joint.join(ranks)
    trained, outputs = optimizers(joint), list[StepOutput]()
    for step in range(6):
        x = activations(step).double()
        outputs.append(joint.step(Batch(x if ranks.is_single else x[:24] if ranks.rank == 0 else x[24:]), *trained))
    return {"state": joint.state_dict(), "shown": {name: torch.as_tensor(value) for name, value in outputs[-1].scalars().items()}}


def train_on_rank(rank: int, folder: str) -> None:
    torch.save(train_in_float64(ProcessGroup.default()), f"{folder}/{rank}.pt")


def test_two_ranks_equal_one_process(tmp_path: Path):
    in_process_group(2, train_on_rank, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = train_in_float64(SINGLE)
    for name, value in expected["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-9, atol=1e-11, msg=name)
    assert {"head/fvu", "train/head_loss"} <= expected["shown"].keys()
    for name, value in expected["shown"].items():
        torch.testing.assert_close(first["shown"][name].double(), value.double(), rtol=1e-9, atol=1e-11, msg=name)


def test_the_memory_plan_counts_a_head():
    without, with_head = (measure.trained_bytes(module("batchtopk", training)) for training in (None, "joint"))
    # 48 embeddings of 4, 4 x 8 weights and 8 biases, 8 x 16 weights, in float32.
    assert with_head - without == 4 * (48 * 4 + 4 * 8 + 8 + 8 * 16)
    assert measure.measure_training(module("batchtopk", "joint"), 64).primary.bytes > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InteractionHead(0), "InteractionHead: rank and hidden must be at least 1, got 0 and 64"),
        (lambda: InteractionHead(4, 0), "rank and hidden must be at least 1, got 4 and 0"),
        (lambda: check_head(torch.nn.Linear(2, 2), "joint", None, None), "head must be a Head, got Linear"),
        (lambda: module("topk", None, head_training="detached"), "head_training: detached needs a head, and there is none"),
        (lambda: check_head(InteractionHead(), "apart", None, None), "head_training must be joint, detached, frozen_sae, got 'apart'"),
        (lambda: module("topk", "frozen_sae"), "frozen_sae trains the head alone, on the squared error of init_from's SAE"),
        (lambda: module("topk", "frozen_sae", init_from="a", objective=EndToEnd()), "set init_from, no objective"),
        (lambda: check_trainer(SimpleNamespace(strategy=Sharded()), InteractionHead()), "head: each rank needs the codes of all latents"),
    ],
)
def test_invalid_arguments_are_refused(make: Any, message: str):
    with pytest.raises(InputError, match=re.escape(message)):
        make()

"""Heads on codes: the formula, what a head changes in training, and what it finds on planted data."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from sae_lens import TopKTrainingSAEConfig
from torch import Tensor
from torch.optim import Adam

from metasae_lightning import functional
from metasae_lightning.compute.process_group import SINGLE, ProcessGroup
from metasae_lightning.errors import InputError
from metasae_lightning.heads import InteractionHead
from metasae_lightning.memory.plan import measure
from metasae_lightning.objectives import EndToEnd
from metasae_lightning.sae.head_loss import HeadTraining
from metasae_lightning.step import Batch, Codes, StepOutput
from metasae_lightning.training import JointSAE
from metasae_lightning.training.argument_checks import check_trainer
from metasae_lightning.training.strategy import Sharded
from tests.helpers.architectures import ARCHITECTURES, D_IN, Batches, activations, config, optimizers
from tests.helpers.ranks import in_process_group

pytestmark = [
    pytest.mark.filterwarnings("ignore:decoder_init_norm must be set"),
    # lightning 2.6 advises on checkpoints under manual optimisation, for which a joint step has no use: callbacks/model_checkpoint.py
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]


def module(
    architecture: str = "batchtopk", training: HeadTraining | None = "joint", cfg: dict[str, Any] | None = None, **kw: Any
) -> JointSAE:
    """A solo SAE with a small head, or without one where `training` is None."""
    head = {} if training is None else {"head": InteractionHead(4, 8), "head_training": training}
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


def restated_loss(joint: JointSAE, x: Tensor, codes: Codes) -> Tensor:
    """`||xhat + h - x||^2` with dense matrices and every pair written out, for the active latents of `codes`."""
    sae, head = joint.primary.sae, joint.primary.head
    mask = torch.zeros(codes.shape, dtype=torch.bool).index_put((codes.rows, codes.latents), torch.tensor(True))
    origin = sae.b_dec if sae.cfg.apply_b_dec_to_input else 0
    acts = ((x - origin) @ sae.W_enc + sae.b_enc) * mask
    f = acts * sae.W_dec.norm(dim=-1) if sae.cfg.rescale_acts_by_decoder_norm else acts
    first, last = head.map[0], head.map[2]  # type: ignore[index, union-attr]
    i, j = torch.triu_indices(f.shape[1], f.shape[1], 1)
    u = (f[:, i] * f[:, j]) @ (head.embeddings[i] * head.embeddings[j]) / head.scale  # type: ignore[union-attr, operator, index]
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
    assert with_head < 0.4 * without, (without, with_head)
    without, with_head = planted_fvus(interactions=0.0)
    assert with_head > 0.95 * without, (without, with_head)

"""The decomposability of blocks: values, gradients, and the mask of meta latents that are active on one block alone."""

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.architectures import SubspaceTrainingSAEConfig
from metasae_lightning.compute.process_group import Parallelism, ProcessGroup
from metasae_lightning.functional.penalties import block_decomposability
from metasae_lightning.penalties import Decomposability, Penalties
from metasae_lightning.sae.critic import LearnerCritic, in_several_blocks
from metasae_lightning.sae.learner import Learner, LearnerConfig
from metasae_lightning.step import Batch, Codes
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import D_IN, activations, config, optimizers

R = 4


def rows(n: int = 40, d: int = D_IN) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def penalty(unit: Any, group_size: int = R, **settings: Any) -> Decomposability:
    made = Decomposability(0.3, 0.7, unit=unit, **settings)
    Penalties({"decomposability": made}, group_size=group_size)
    return made


def halving(rows: Tensor, /, blocks: Tensor | None = None) -> Tensor:
    return 0.5 * rows.roll(1, 0)


def test_the_value_and_gradient_of_blocks_equal_the_formula_and_autograd():
    W = (3 * rows()).requires_grad_()
    value = penalty("block")(W, halving, 0)
    (gradient,) = torch.autograd.grad(value, W)
    # exp of minus the mean error of the four rows of a block, over 0.7; written out.
    u = W / W.norm(dim=-1, keepdim=True)
    errors = (u - (0.5 * u.roll(1, 0)).detach()).square().sum(-1)
    expected = torch.stack([torch.exp(-errors[R * g : R * g + R].mean() / 0.7) for g in range(10)]).mean()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, W)[0], rtol=0, atol=1e-12)
    whole = block_decomposability(W, halving(functional.unit_rows(W)), 0.7, group_size=R).mean()
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=0)
    # The control: rows are another penalty, unless the rows of a block have equal errors.
    assert abs(penalty("row")(W, halving, 0).item() - value.item()) > 1e-4


@pytest.mark.parametrize("unit", ["row", "block", "masked_block"])
def test_without_blocks_every_unit_is_the_papers_row_bit_for_bit(unit: str):
    def critic(rows: Tensor, /, blocks: Tensor | None = None) -> Tensor:
        assert blocks is None
        return 0.5 * rows.roll(1, 0)

    results = []
    for made in (Decomposability(0.3, 0.7, unit="row"), penalty(unit, 1)):
        W = rows().requires_grad_()
        value = made(W, critic, 0)
        value.backward()
        results.append((value.detach(), W.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] is not None and results[1][1] is not None and torch.equal(results[0][1], results[1][1])


def test_a_fraction_of_the_rows_is_a_fraction_of_whole_blocks():
    W, seen = rows().requires_grad_(), []

    def critic(rows: Tensor, /, blocks: Tensor | None = None) -> Tensor:
        seen.append((rows.clone(), blocks))
        return 0.5 * rows

    penalty("masked_block", rows=0.3, seed=1)(W, critic, 7).backward()
    ((drawn, blocks),) = seen
    # 30 % of 10 blocks
    assert drawn.shape == (12, D_IN) and blocks.unique().numel() == 3
    assert (blocks.view(3, R) == blocks[::R, None]).all()
    torch.testing.assert_close(drawn, functional.unit_rows(W.detach()).view(10, R, D_IN)[blocks[::R]].view(12, D_IN))
    assert W.grad is not None
    assert set(W.grad.view(10, -1).abs().sum(1).nonzero().flatten().tolist()) == set(blocks.tolist())


class TwoRanks(ProcessGroup):
    """Rank `rank` of two whose reductions return a prepared result."""

    def __init__(self, rank: int, reduced: dict[str, Tensor] | None = None):
        super().__init__(rank, 2)
        object.__setattr__(self, "reduced", reduced)

    def all_reduce_min_(self, *tensors: Tensor) -> None:
        tensors[0].copy_(self.reduced["min"])  # type: ignore[attr-defined]

    def all_reduce_max_(self, *tensors: Tensor) -> None:
        tensors[0].copy_(self.reduced["max"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_the_shares_of_two_ranks_are_whole_blocks_and_add_up(fraction: float):
    W = rows(44)
    made = penalty("block", rows=fraction)

    def critic(rows: Tensor, /, blocks: Tensor | None = None) -> Tensor:
        assert len(rows) % R == 0
        return 0.5 * rows.flip(1)

    shares = []
    for rank in range(2):
        group = ProcessGroup(rank, 2)
        shares.append(made.rank_share(W, critic, 3, Parallelism(group, group)))
    # 11 blocks, or 6 of them drawn: no rank has half of a block.
    torch.testing.assert_close(sum(shares), made(W, critic, 3), rtol=1e-12, atol=0)
    assert shares[0] != shares[1]


def test_a_latent_is_in_several_blocks_if_rows_of_another_rank_have_it():
    # Latents 0 and 1 are active on block 5 here; latent 1 is also active on block 2 of the other rank.
    codes, blocks = Codes.from_dense(torch.tensor([[1.0, 1.0], [0.0, 2.0]])), torch.tensor([5, 5])
    assert in_several_blocks(codes, blocks=blocks, ranks=ProcessGroup()).tolist() == [False, False, False]
    reduced = {"min": torch.tensor([5, 2]), "max": torch.tensor([5, 5])}
    assert in_several_blocks(codes, blocks=blocks, ranks=TwoRanks(0, reduced)).tolist() == [False, True, True]


METAS = {
    "batchtopk": config("batchtopk", 24, dtype="float64"),
    "rescaled": config("topk", 24, rescale_acts_by_decoder_norm=True, dtype="float64"),
    "standard": config("standard", 24, dtype="float64"),
    "abstopk": config("abstopk", 24, dtype="float64"),
    "subspace": SubspaceTrainingSAEConfig(d_in=D_IN, d_sae=24, k=2, group_size=2, decoder_init_norm=1.0, dtype="float64"),
}


@pytest.mark.parametrize("kernels", ["sparse", "dense"])
@pytest.mark.parametrize("name", METAS)
def test_the_masked_critic_decodes_what_other_blocks_have_too(name: str, kernels: Any):
    learner = Learner(METAS[name], LearnerConfig(100, kernels=kernels, decoder_rows="free"), role="meta", seed=0)
    with torch.no_grad():
        learner.sae.W_dec.mul_(torch.linspace(0.5, 1.5, 24, dtype=torch.float64)[:, None])
        if name == "standard":
            learner.sae.b_enc.sub_(0.3)
    x, blocks = functional.unit_rows(rows(8)), torch.arange(4).repeat_interleave(2)
    acts, size = learner.sae.encode(x).detach(), getattr(METAS[name], "group_size", 1)
    masked, fires = acts.clone(), acts.view(8, -1, size).abs().sum(-1) > 0
    left_out = 0
    for i, j in fires.nonzero().tolist():
        if not any(fires[other, j] and blocks[other] != blocks[i] for other in range(8)):
            masked[i, j * size : (j + 1) * size] = 0
            left_out += 1
    assert 0 < left_out < fires.sum()  # else the case proves nothing
    before = {key: tensor.clone() for key, tensor in learner.state_dict().items()}
    state = torch.get_rng_state()
    critic = LearnerCritic(learner)
    torch.testing.assert_close(critic(x, blocks), learner.sae.decode(masked).detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(critic(x), learner.sae.decode(acts).detach(), rtol=1e-9, atol=1e-11)
    assert (critic(x, blocks).clone() - critic(x)).abs().max() > 1e-3
    assert all(torch.equal(tensor, before[key]) for key, tensor in learner.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def joint(weight: float | None, unit: str = "masked_block") -> JointSAE:
    cfg = SubspaceTrainingSAEConfig(d_in=D_IN, d_sae=24, k=2, group_size=R, decoder_init_norm=1.0, nuclear_coefficient=0.1)
    meta = BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=24, k=1, decoder_init_norm=1.0)  # most latents are active on one block
    penalties: Any = {} if weight is None else {"p": Decomposability(weight, unit=unit)}  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="trains along") if weight is None else nullcontext():
        return JointSAE(cfg, meta, penalties, n_p=2, n_m=1, cuda_graph=False)


def trained(module: JointSAE, steps: int = 5) -> Tensor:
    made = optimizers(module)
    for step in range(steps):
        module.step(Batch(activations(step)), *made)
    return module.primary.W_dec.detach().clone()


def test_weight_zero_is_no_penalty_and_units_are_different_penalties():
    assert torch.equal(trained(joint(None)), trained(joint(0.0)))
    decoders = [trained(joint(1.0, unit)) for unit in ("row", "block", "masked_block")]
    assert len({tuple(decoder.flatten().tolist()) for decoder in decoders}) == 3
    assert copy.deepcopy(joint(1.0)).penalties["p"].group_size == R

"""Candidates from before keep what a search through everything keeps."""

import pytest
import torch
from torch import Tensor

from metasae_lightning import compute, functional
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import activations, config, optimizers


def moving(steps: int, size: float, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Unit rows, an encoder and a bias that move a little from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    rows, W_enc, b_enc = torch.randn(300, 64, generator=generator), torch.randn(64, 80, generator=generator), torch.zeros(80)
    found = []
    for _ in range(steps):
        found.append((functional.unit_rows(rows), W_enc.clone(), b_enc.clone()))
        rows += size * torch.randn(rows.shape, generator=generator)
        W_enc += size * torch.randn(W_enc.shape, generator=generator) / 8
        b_enc += size * torch.randn(b_enc.shape, generator=generator) / 8
    return found


# Rows moved by 0.001 need few searches; by 1, one at every step; and what is kept is right at any speed.
@pytest.mark.parametrize(("size", "searches"), [(1e-4, 1), (1.0, 12)])
def test_what_is_kept_is_what_a_search_keeps(size: float, searches: int):
    incremental = compute.IncrementalTopK(300)
    for x, W_enc, b_enc in moving(12, size):
        fast = compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=incremental))
        slow = compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False))
        assert torch.equal(fast.pattern.rows, slow.pattern.rows) and torch.equal(fast.pattern.columns, slow.pattern.columns)
        torch.testing.assert_close(fast.values, slow.values, rtol=1e-5, atol=1e-6)
    assert incremental.searches == searches


def test_candidates_alone_would_have_been_wrong():
    """Control: without the bound, candidates of the first step miss what is kept later."""
    (x, W_enc, b_enc), *_, (x_late, W_late, b_late) = moving(12, 0.3)
    first = compute.encode(x, W_enc, b_enc, compute.TopKRule(4 * 4, False)).pattern
    late = compute.encode(x_late, W_late, b_late, compute.TopKRule(4, False)).pattern
    candidates = set(zip(first.rows.tolist(), first.columns.tolist(), strict=True))
    assert set(zip(late.rows.tolist(), late.columns.tolist(), strict=True)) - candidates


def test_one_row_that_jumps_is_seen():
    incremental, (x, W_enc, b_enc) = compute.IncrementalTopK(300), moving(1, 0)[0]
    compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=incremental))
    x = x.clone()
    x[17] = functional.unit_rows(W_enc.T[:1])[0]
    fast, slow = (compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=s)) for s in (incremental, None))
    assert torch.equal(fast.pattern.columns, slow.pattern.columns) and incremental.searches == 2


@pytest.mark.parametrize("bias", [False, True])
def test_a_latent_that_jumps_is_seen(bias: bool):
    """The rows stay where they are; one latent's encoder or bias moves until it is every row's."""
    incremental, (x, W_enc, b_enc) = compute.IncrementalTopK(300), moving(1, 0)[0]
    compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=incremental))
    W_enc, b_enc = W_enc.clone(), b_enc.clone()
    if bias:
        b_enc[31] = 5.0
    else:
        W_enc[:, 31] = 5 * x[17]
    fast, slow = (compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=s)) for s in (incremental, None))
    assert torch.equal(fast.pattern.columns, slow.pattern.columns) and incremental.searches == 2


def test_when_everything_was_searched_leaves_no_trace():
    """A run that goes on from a checkpoint has no candidates from before."""
    incremental, apart = compute.IncrementalTopK(300), torch.tensor([3, 40, 77])
    found = [
        compute.encode(x, W, b, compute.TopKRule(4, False, incremental=incremental), extra_latents=apart) for x, W, b in moving(6, 1e-3)
    ]
    anew = [
        compute.encode(x, W, b, compute.TopKRule(4, False, incremental=compute.IncrementalTopK(300)), extra_latents=apart)
        for x, W, b in moving(6, 1e-3)
    ]
    assert incremental.searches < 6
    assert all(
        torch.equal(a.values, b.values) and torch.equal(a.extra_pre_acts, b.extra_pre_acts) for a, b in zip(found, anew, strict=True)
    )


def test_a_critic_that_was_asked_in_inference_mode_learns_on():
    module, other = trained(), trained()
    with torch.inference_mode():  # as a callback may, while Lightning validates
        module.meta.reconstruct(functional.unit_rows(module.primary.W_dec))  # type: ignore[union-attr]
    for one in (module, other):
        both = optimizers(one)
        for i in range(17, 21):
            one.step(Batch(activations(i)), *both)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())


def test_few_positive_and_none_at_all():
    incremental, x, W_enc = compute.IncrementalTopK(30), functional.unit_rows(torch.randn(30, 8)), torch.randn(8, 10)
    none = compute.encode(x, W_enc, torch.full((10,), -1e3), compute.TopKRule(2, False, incremental=incremental))
    few = compute.encode(
        x, W_enc, -(x @ W_enc).flatten().topk(5).values[-1].expand(10), compute.TopKRule(2, False, incremental=incremental)
    )
    assert len(none.values) == 0 and len(few.values) in (4, 5)


def trained(**settings: object) -> JointSAE:
    module = JointSAE(
        config("batchtopk", rescale_acts_by_decoder_norm=False),
        config("batchtopk", d_sae=12, rescale_acts_by_decoder_norm=False),
        {"d": Decomposability(0.3)},
        n_p=5,
        n_m=2,
        **settings,  # type: ignore[arg-type]
    )
    both = optimizers(module)
    for i in range(17):
        module.step(Batch(activations(i)), *both)
    return module


def test_a_run_with_screens_is_the_run_without():
    fast, slow = trained(), trained(kernels="dense")
    assert fast.meta._forward_pass.incremental_topk.searches < 17 + 6  # type: ignore[union-attr]
    for name, tensor in slow.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_held_supports_are_those_of_the_first_step_after_the_critic_learnt():
    module = trained(critic_supports="macro_step")
    held, both = module.meta.cached_support, optimizers(module)  # type: ignore[union-attr]
    assert held is not None and int(module.primary.steps) == 17
    module.step(Batch(activations(17)), *both)
    assert module.meta.cached_support[1].equal(held[1])  # type: ignore[union-attr,index]
    for i in range(18, 20):  # the twentieth ends a macro-step: the critic learns and lets go
        module.step(Batch(activations(i)), *both)
    assert module.meta.cached_support is None  # type: ignore[union-attr]
    exact = trained()
    assert not torch.equal(exact.primary.W_dec, module.primary.W_dec)  # control: it is an approximation


def test_held_supports_go_through_a_checkpoint():
    module, checkpoint = trained(critic_supports="macro_step"), dict[str, object]()
    module.on_save_checkpoint(checkpoint)
    other = trained(critic_supports="macro_step")
    other.load_state_dict(module.state_dict())
    other.meta.cached_support = None  # type: ignore[union-attr]
    other.on_load_checkpoint(checkpoint)
    for each in (module, other):
        each.step(Batch(activations(17)), *optimizers(each))
    assert torch.equal(other.primary.W_dec, module.primary.W_dec)
    assert _saved(trained())["critic_supports"] is None


def _saved(module: JointSAE) -> dict[str, object]:
    checkpoint: dict[str, object] = {}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_some_rows_give_the_mean_of_all_on_average():
    module, values, gradients = trained(), [], []
    W_dec = module.primary.W_dec.detach()
    critic = lambda rows: 0.5 * rows.roll(1, 1)  # noqa: E731 - a critic that judges each row alone
    whole = W_dec.clone().requires_grad_()
    exact = Decomposability(0.3)(whole, critic, 0)
    exact.backward()
    for step in range(400):
        some = W_dec.clone().requires_grad_()
        value = Decomposability(0.3, rows=0.25)(some, critic, step)
        value.backward()
        values.append(value.detach())
        gradients.append(some.grad)
    # 12 of 48 rows: the mean of 400 draws has a standard error of at most std/sqrt(12 * 400) in each.
    spread = torch.stack(values).std() / 20
    assert abs(torch.stack(values).mean() - exact) < 4 * spread
    torch.testing.assert_close(torch.stack(gradients).mean(0), whole.grad, rtol=0, atol=0.2 * whole.grad.abs().max().item())  # type: ignore[union-attr]


def test_a_meta_step_may_read_some_rows():
    module = trained(meta_rows=16)
    assert int(module.meta.rows_seen) == 3 * 2 * 16  # type: ignore[union-attr]
    assert not torch.equal(module.meta.W_dec, trained().meta.W_dec)  # type: ignore[union-attr]
    again = trained(meta_rows=16)
    assert torch.equal(again.meta.W_dec, module.meta.W_dec)  # type: ignore[union-attr]


def test_a_draw_of_the_rows_is_searched_and_leaves_what_is_known_of_all():
    incremental, (x, W_enc, b_enc) = compute.IncrementalTopK(300), moving(1, 0)[0]
    for rows in (x, x[:40], x):
        fast, slow = (compute.encode(rows, W_enc, b_enc, compute.TopKRule(4, False, incremental=s)) for s in (incremental, None))
        assert torch.equal(fast.pattern.columns, slow.pattern.columns)
    assert incremental.searches == 1

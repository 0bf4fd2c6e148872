"""Incremental top-k against full searches: in calls of `encode`, and in joint training."""

import pytest
import torch
from torch import Tensor

from metasae_lightning import compute, functional
from metasae_lightning.penalties import Decomposability
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import activations, config, optimizers


def moving(steps: int, size: float, seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Unit rows, an encoder and a bias at each step of a random walk with steps of this size."""
    generator = torch.Generator().manual_seed(seed)
    rows, W_enc, b_enc = torch.randn(300, 64, generator=generator), torch.randn(64, 80, generator=generator), torch.zeros(80)
    inputs = []
    for _ in range(steps):
        inputs.append((functional.unit_rows(rows), W_enc.clone(), b_enc.clone()))
        rows += size * torch.randn(rows.shape, generator=generator)
        W_enc += size * torch.randn(W_enc.shape, generator=generator) / 8
        b_enc += size * torch.randn(b_enc.shape, generator=generator) / 8
    return inputs


# Steps of 1e-4 need one full search, steps of 1 need one at every step; the selection is exact in both cases.
@pytest.mark.parametrize(("size", "searches"), [(1e-4, 1), (1.0, 12)])
def test_incremental_selection_equals_a_full_search(size: float, searches: int):
    incremental = compute.IncrementalTopK(300)
    for x, W_enc, b_enc in moving(12, size):
        fast = compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=incremental))
        slow = compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False))
        assert torch.equal(fast.pattern.rows, slow.pattern.rows) and torch.equal(fast.pattern.columns, slow.pattern.columns)
        torch.testing.assert_close(fast.values, slow.values, rtol=1e-5, atol=1e-6)
    assert incremental.searches == searches


def test_old_candidates_without_the_bound_miss_selected_latents():
    """The control: the candidates of the first step do not contain all latents that are selected later."""
    (x, W_enc, b_enc), *_, (x_late, W_late, b_late) = moving(12, 0.3)
    first = compute.encode(x, W_enc, b_enc, compute.TopKRule(4 * 4, False)).pattern
    late = compute.encode(x_late, W_late, b_late, compute.TopKRule(4, False)).pattern
    candidates = set(zip(first.rows.tolist(), first.columns.tolist(), strict=True))
    assert set(zip(late.rows.tolist(), late.columns.tolist(), strict=True)) - candidates


def test_jump_of_one_row_triggers_a_full_search():
    incremental, (x, W_enc, b_enc) = compute.IncrementalTopK(300), moving(1, 0)[0]
    compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=incremental))
    x = x.clone()
    x[17] = functional.unit_rows(W_enc.T[:1])[0]
    fast, slow = (compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=topk)) for topk in (incremental, None))
    assert torch.equal(fast.pattern.columns, slow.pattern.columns) and incremental.searches == 2


@pytest.mark.parametrize("bias", [False, True])
def test_jump_of_one_latent_triggers_a_full_search(bias: bool):
    """The rows stay the same; the encoder or the bias of one latent changes so much that it becomes active."""
    incremental, (x, W_enc, b_enc) = compute.IncrementalTopK(300), moving(1, 0)[0]
    compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=incremental))
    W_enc, b_enc = W_enc.clone(), b_enc.clone()
    if bias:
        b_enc[31] = 5.0
    else:
        W_enc[:, 31] = 5 * x[17]
    fast, slow = (compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=topk)) for topk in (incremental, None))
    assert torch.equal(fast.pattern.columns, slow.pattern.columns) and incremental.searches == 2


def test_values_have_the_same_bits_whenever_the_last_full_search_was():
    """A run that resumes from a checkpoint has no earlier candidates."""
    incremental, extra = compute.IncrementalTopK(300), torch.zeros(moving(1, 0)[0][1].shape[1], dtype=torch.bool)
    extra[[3, 40, 77]] = True
    incremental_results, full_results = (
        [
            compute.encode(x, W_enc, b_enc, compute.TopKRule(4, False, incremental=topk), extra=extra)
            for (x, W_enc, b_enc), topk in zip(moving(6, 1e-3), topks, strict=True)
        ]
        for topks in ([incremental] * 6, [compute.IncrementalTopK(300) for _ in range(6)])
    )
    assert incremental.searches < 6
    for a, b in zip(incremental_results, full_results, strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(a.extra_pre_acts, b.extra_pre_acts)


def test_critic_used_in_inference_mode_trains_on_with_the_same_bits():
    module, control = train_module(), train_module()
    with torch.inference_mode():  # as a callback may, while Lightning validates
        module.meta.reconstruct(functional.unit_rows(module.primary.W_dec))  # type: ignore[union-attr]
    for joint in (module, control):
        both = optimizers(joint)
        for i in range(17, 21):
            joint.step(Batch(activations(i)), *both)
    assert all(torch.equal(value, control.state_dict()[name]) for name, value in module.state_dict().items())


def test_incremental_selection_contains_positive_activations_only():
    x, W_enc = functional.unit_rows(torch.randn(30, 8)), torch.randn(8, 10)
    rule = compute.TopKRule(2, False, incremental=compute.IncrementalTopK(30))
    without_positive = compute.encode(x, W_enc, torch.full((10,), -1e3), rule)
    with_few_positive = compute.encode(x, W_enc, -(x @ W_enc).flatten().topk(5).values[-1].expand(10), rule)
    assert len(without_positive.values) == 0 and len(with_few_positive.values) in (4, 5)


def train_module(**settings: object) -> JointSAE:
    """A joint SAE after 17 steps."""
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


def test_training_with_incremental_top_k_equals_training_with_dense_kernels():
    fast, slow = train_module(), train_module(kernels="dense")
    assert fast.meta.forward_pass.incremental_topk.searches < 17 + 6  # type: ignore[union-attr]
    for name, tensor in slow.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_macro_step_supports_are_reused_until_the_next_meta_phase():
    module = train_module(critic_supports="macro_step")
    support, both = module.meta.cached_support, optimizers(module)  # type: ignore[union-attr]
    assert support is not None and int(module.primary.steps) == 17
    module.step(Batch(activations(17)), *both)
    assert module.meta.cached_support[1].equal(support[1])  # type: ignore[union-attr,index]
    for i in range(18, 20):  # step 20 ends a macro-step: the critic is trained, and its cached support is dropped
        module.step(Batch(activations(i)), *both)
    assert module.meta.cached_support is None  # type: ignore[union-attr]
    exact = train_module()
    assert not torch.equal(exact.primary.W_dec, module.primary.W_dec)  # control: reuse is an approximation


def test_macro_step_supports_are_restored_from_a_checkpoint():
    module, checkpoint = train_module(critic_supports="macro_step"), dict[str, object]()
    module.on_save_checkpoint(checkpoint)
    resumed = train_module(critic_supports="macro_step")
    resumed.load_state_dict(module.state_dict())
    resumed.meta.cached_support = None  # type: ignore[union-attr]
    resumed.on_load_checkpoint(checkpoint)
    for joint in (module, resumed):
        joint.step(Batch(activations(17)), *optimizers(joint))
    assert torch.equal(resumed.primary.W_dec, module.primary.W_dec)
    checkpoint_of_exact = dict[str, object]()
    train_module().on_save_checkpoint(checkpoint_of_exact)
    assert checkpoint_of_exact["critic_supports"] is None


def test_penalty_on_random_rows_is_unbiased():
    module, values, gradients = train_module(), [], []
    W_dec = module.primary.W_dec.detach()
    critic = lambda rows: 0.5 * rows.roll(1, 1)  # noqa: E731 - a critic that reconstructs each row independently
    all_rows = W_dec.clone().requires_grad_()
    exact = Decomposability(0.3)(all_rows, critic, 0)
    exact.backward()
    for step in range(400):
        leaf = W_dec.clone().requires_grad_()
        value = Decomposability(0.3, rows=0.25)(leaf, critic, step)
        value.backward()
        values.append(value.detach())
        gradients.append(leaf.grad)
    # The mean of 400 draws has a standard error of std / sqrt(400).
    standard_error = torch.stack(values).std() / 20
    assert abs(torch.stack(values).mean() - exact) < 4 * standard_error
    atol = 0.2 * all_rows.grad.abs().max().item()  # type: ignore[union-attr]
    torch.testing.assert_close(torch.stack(gradients).mean(0), all_rows.grad, rtol=0, atol=atol)


def test_meta_rows_limits_a_meta_step_to_reproducibly_drawn_rows():
    module = train_module(meta_rows=16)
    assert int(module.meta.rows_seen) == 3 * 2 * 16  # type: ignore[union-attr]
    assert not torch.equal(module.meta.W_dec, train_module().meta.W_dec)  # type: ignore[union-attr]
    repeated = train_module(meta_rows=16)
    assert torch.equal(repeated.meta.W_dec, module.meta.W_dec)  # type: ignore[union-attr]


def test_batch_with_fewer_rows_leaves_the_candidates_of_all_rows():
    incremental, (x, W_enc, b_enc) = compute.IncrementalTopK(300), moving(1, 0)[0]
    for rows in (x, x[:40], x):
        fast, slow = (compute.encode(rows, W_enc, b_enc, compute.TopKRule(4, False, incremental=topk)) for topk in (incremental, None))
        assert torch.equal(fast.pattern.columns, slow.pattern.columns)
    assert incremental.searches == 1

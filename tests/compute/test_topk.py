"""Top-k selection against torch.topk: the same indices, by each way of searching."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metasae_lightning import compute
from metasae_lightning.compute import topk
from metasae_lightning.compute.process_group import SINGLE
from metasae_lightning.compute.topk_across_ranks import topk_across_ranks

ROWS, D_IN, D_SAE = 40, 6, 50


def reference_indices(x: Tensor, W_enc: Tensor, b_enc: Tensor, count: int) -> Tensor:
    """Flat indices of the `count` largest positive pre-activations, in order; ties go to the smaller index."""
    pre_acts = (x.double() @ W_enc.double() + b_enc.double()).relu().flatten()
    threshold = pre_acts.topk(count).values[-1]
    above, ties = (pre_acts > threshold).nonzero().flatten(), ((pre_acts == threshold) & (pre_acts > 0)).nonzero().flatten()
    return torch.cat([above, ties[: count - len(above)]]).sort().values


def integer_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, encoder and bias of small integers: their float32 products are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc = (torch.randint(-3, 4, size, generator=generator).float() for size in [(ROWS, D_IN), (D_IN, D_SAE), (D_SAE,)])
    return x, W_enc, b_enc


def random_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, encoder and bias in float64: no two products are equal."""
    generator = torch.Generator().manual_seed(seed)
    x, W_enc, b_enc = (torch.randn(size, generator=generator, dtype=torch.float64) for size in [(ROWS, D_IN), (D_IN, D_SAE), (D_SAE,)])
    return x, W_enc, b_enc


def flat_indices(encoded: compute.Encoded) -> Tensor:
    return encoded.pattern.rows * D_SAE + encoded.pattern.columns


@pytest.mark.parametrize("block_rows", [ROWS, 1])
@pytest.mark.parametrize("hint", [None, 1e-3, 1e3])
@pytest.mark.parametrize("count", [1, 30, 120, 1200])
def test_top_k_of_a_batch_equals_the_reference_with_ties_by_index(
    count: int, hint: float | None, block_rows: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(topk, "BLOCK", block_rows * D_SAE)
    monkeypatch.setattr(topk, "BLOCK_ROWS", block_rows)
    for seed in range(5):
        inputs = integer_inputs(seed)
        rule = compute.TopKRule(count / ROWS + 1e-9, per_row=False, hint=hint)
        assert torch.equal(flat_indices(compute.encode(*inputs, rule)), reference_indices(*inputs, count)), seed


def test_integer_inputs_have_ties_at_the_threshold():
    """The control: the rule for ties decides which indices are selected."""
    for seed in range(5):
        x, W_enc, b_enc = integer_inputs(seed)
        pre_acts = (x @ W_enc + b_enc).flatten()
        assert (pre_acts >= pre_acts.topk(120).values[-1]).sum() > 120


# Narrow blocks are searched column block by column block: the order of ties is theirs, so no two products are equal here.
@pytest.mark.parametrize("block", [60, 7 * D_SAE, ROWS * D_SAE])
@pytest.mark.parametrize("per_row", [False, True])
def test_top_k_in_blocks_of_any_shape_equals_the_reference(per_row: bool, block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk, "BLOCK", block)
    monkeypatch.setattr(topk, "BLOCK_ROWS", 7)
    for seed in range(5):
        x, W_enc, b_enc = random_inputs(seed)
        encoded = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, per_row))
        if per_row:
            expected = torch.cat([reference_indices(x[row : row + 1], W_enc, b_enc, 3) + row * D_SAE for row in range(ROWS)])
        else:
            expected = reference_indices(x, W_enc, b_enc, 3 * ROWS)
        assert torch.equal(flat_indices(encoded), expected), seed


def test_incremental_top_k_equals_the_reference_with_ties_by_index():
    for seed in range(5):
        (x, W_enc, b_enc), incremental = integer_inputs(seed), compute.IncrementalTopK(ROWS)
        rule = compute.TopKRule(0.5, per_row=False, incremental=incremental)
        for _ in range(2):  # a full search, then the candidates of that search
            assert torch.equal(flat_indices(compute.encode(x, W_enc, b_enc, rule)), reference_indices(x, W_enc, b_enc, ROWS // 2)), seed
        assert incremental.searches == 1


@pytest.mark.parametrize("count", [1, 30, 120, 1200])
def test_radix_selection_equals_the_reference_with_ties_by_index(count: int):
    for seed in range(5):
        x, W_enc, b_enc = integer_inputs(seed)
        mask = topk_across_ranks((x @ W_enc + b_enc).flatten(), count, SINGLE)
        assert torch.equal(mask.keep.nonzero().flatten(), reference_indices(x, W_enc, b_enc, count)), seed


@given(st.integers(1, 3000), st.floats(0, 1.2), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_largest_indices_equals_torch_topk(size: int, fraction: float, zeros: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) >= zeros)
    count = min(size, int(fraction * size))
    expected = values.topk(count).values
    selected = values[compute.largest_indices(values, count)].sort(descending=True).values
    assert torch.equal(selected, expected[: len(selected)])
    assert not expected[len(selected) :].any()


# All values of the sample are large, or all are 0.
@pytest.mark.parametrize("sampled_value", [0.0, 100.0])
def test_largest_indices_is_exact_when_the_sample_misleads(sampled_value: float):
    values = torch.rand(topk.STRIDE * 100, generator=torch.Generator().manual_seed(0))
    values[:: topk.STRIDE] = sampled_value
    indices = compute.largest_indices(values, 500)
    assert torch.equal(values[indices].sort().values, values.topk(500).values.sort().values)


def test_largest_indices_returns_count_different_indices_of_equal_values():
    values = torch.ones(1000)
    assert len(set(compute.largest_indices(values, 77).tolist())) == 77

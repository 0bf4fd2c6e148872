"""Sparse encoding and decoding against the dense formulas."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metasae_lightning import compute
from metasae_lightning.compute import row_chunks, topk
from metasae_lightning.compute import sparse_matrix as patterns
from metasae_lightning.compute.gpu import encoder


@pytest.fixture(params=["one block", "many blocks", "GPU code path"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small that rows and latents are both divided; also with the GPU's code path, run on a CPU."""
    if request.param != "one block":
        monkeypatch.setattr(topk, "BLOCK", 60)
        monkeypatch.setattr(encoder, "BLOCK", 60)
        monkeypatch.setattr(topk, "BLOCK_ROWS", 7)
        monkeypatch.setattr(patterns, "TRANSPOSED_ELEMENTS", 70)
        monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", 50)
    with row_chunks.dry_run_scale(1.0, gpu=request.param == "GPU code path"):
        yield


def inputs(rows: int = 24, d_in: int = 10, d_sae: int = 40, seed: int = 0) -> tuple[Tensor, ...]:
    """Rows, encoder, its bias, the origin and a decoder, in float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (rows, d_in), (d_in, d_sae), (d_sae,), (d_in,), (d_sae, d_in)
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes)


def reference(tensors: tuple[Tensor, ...], k: float, *, per_row: bool, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula on dense matrices: activations, 0 where not selected, and their product with the decoder."""
    x, W_enc, b_enc, origin, W_dec = tensors
    raw = (x - origin) @ W_enc + b_enc
    ranked = raw.detach() if scale is None else raw.detach() * scale
    if per_row:
        keep = torch.zeros_like(raw, dtype=torch.bool).scatter(1, ranked.topk(int(k), dim=1).indices, True)
    else:
        keep = torch.zeros(raw.numel(), dtype=torch.bool)
        keep[ranked.relu().flatten().topk(int(k * len(x))).indices] = True
        keep = keep.view(raw.shape)
    acts = torch.where(keep & (raw > 0), raw, 0.0)
    return acts, acts @ W_dec


EXTRA = torch.tensor([3, 7, 39])
EXTRA_MASK = torch.zeros(40, dtype=torch.bool).index_fill(0, EXTRA, True)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("hint", [None, 100.0, 1e-3, 1.5])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_encode_and_decode_equal_the_dense_formula_in_values_and_gradients(per_row: bool, scaled: bool, hint: float | None):
    tensors = inputs()
    x, W_enc, b_enc, origin, W_dec = tensors
    scale = torch.rand(40, dtype=torch.float64) + 0.5 if scaled else None

    def ours(x: Tensor, W_enc: Tensor, b_enc: Tensor, origin: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rule = compute.TopKRule(3, per_row, hint)
        encoded = compute.encode(x, W_enc, b_enc, rule, origin=origin, scale=scale, extra=EXTRA_MASK)
        product, extra_rows = compute.decode(encoded.values, encoded.pattern, W_dec, EXTRA)
        return product, encoded.extra_pre_acts, extra_rows

    acts, product = reference(tensors, 3, per_row=per_row, scale=scale)
    sparse, dense = ours(*tensors), (product, ((x - origin) @ W_enc + b_enc)[:, EXTRA], W_dec[EXTRA])
    torch.testing.assert_close(sparse[0], dense[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sparse[1], dense[1], rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(output) for output in sparse]
    gradients, expected_gradients = (
        torch.autograd.grad(sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)), tensors)  # type: ignore[arg-type]
        for outputs in (sparse, dense)
    )
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(ours, tensors, fast_mode=True)
    assert (acts != 0).sum() > 40  # control: the batch has active latents


@pytest.mark.usefixtures("blocks")
def test_squared_error_equals_its_formula_in_value_and_gradients():
    x, W_enc, b_enc, origin, W_dec = inputs()
    acts, product = reference((x, W_enc, b_enc, origin, W_dec), 3, per_row=False, scale=None)
    rows, columns = acts.nonzero(as_tuple=True)
    pattern, values, b_dec = compute.Pattern(rows, columns, (24, 40)), acts[rows, columns].detach().requires_grad_(), origin
    error, difference, extra_rows = compute.squared_error(values, pattern, W_dec, b_dec, x, EXTRA)
    torch.testing.assert_close(error, (product + b_dec - x).square().sum(1).mean())
    torch.testing.assert_close(difference, (product + b_dec - x).detach())
    assert torch.equal(extra_rows, W_dec[EXTRA]) and not difference.requires_grad

    def differentiable_outputs(values: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        error, _, extra_rows = compute.squared_error(values, pattern, W_dec, b_dec, x, EXTRA)
        return error, extra_rows

    assert torch.autograd.gradcheck(differentiable_outputs, (values, W_dec, b_dec, x), fast_mode=True)


@pytest.mark.usefixtures("blocks")
@given(
    st.integers(1, 40), st.integers(1, 30), st.floats(0, 12), st.integers(0, 10_000), st.sampled_from(["plain", "ties", "one row", "none"])
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_encode_selects_the_largest_activations_of_the_batch(rows: int, latents: int, k: float, seed: int, kind: str):
    """Also with ties at the threshold, with one row that has far more than k active latents, and with no positive activation."""
    generator = torch.Generator().manual_seed(seed)
    pre_acts = torch.randn(rows, latents, generator=generator, dtype=torch.float64)
    if kind == "ties":
        pre_acts = (2 * pre_acts).round()
    elif kind == "one row":
        pre_acts[seed % rows] += 100
    elif kind == "none":
        pre_acts = -pre_acts.abs()
    count = min(int(k * rows), rows * latents)
    rule = compute.TopKRule(count / rows + 1e-9, per_row=False)
    encoded = compute.encode(pre_acts, torch.eye(latents, dtype=torch.float64), torch.zeros(latents, dtype=torch.float64), rule)
    expected = pre_acts.relu().flatten().topk(count).values
    expected = expected[expected > 0]
    assert torch.equal(encoded.values.sort(descending=True).values, expected)
    flat_indices = encoded.pattern.rows * latents + encoded.pattern.columns
    assert torch.equal(flat_indices, flat_indices.unique())  # each once, in order
    assert torch.equal(pre_acts.flatten()[flat_indices], encoded.values)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("hint", [None, 1e-3, 1.09])
def test_rising_threshold_excludes_no_activation_close_to_it(hint: float | None):
    """All activations lie within a tenth of each other: the candidates are reduced many times, and many are close to the threshold."""
    pre_acts = 1 + torch.rand(64, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    rule = compute.TopKRule(0.8, False, hint)
    encoded = compute.encode(pre_acts, torch.eye(500, dtype=torch.float64), torch.zeros(500, dtype=torch.float64), rule)
    assert torch.equal(encoded.values.sort(descending=True).values, pre_acts.flatten().topk(51).values)


def test_large_bias_that_cancels_excludes_no_activation():
    """In float32, 1001.00006 - 1000 rounds to more than 1.00005."""
    x, W_enc, b_enc = torch.ones(1, 1), torch.tensor([[1001.000061, 1.000055]]), torch.tensor([-1000.0, 0.0])
    assert compute.encode(x, W_enc, b_enc, compute.TopKRule(1, False)).pattern.columns.tolist() == [0]


def test_extra_pre_activations_are_returned_when_no_latent_is_selected():
    x, W_enc, b_enc, _, _ = (tensor.detach() for tensor in inputs(rows=1))
    encoded = compute.encode(x, W_enc, b_enc, compute.TopKRule(0.5, False), extra=EXTRA_MASK)
    assert not len(encoded.values)
    torch.testing.assert_close(encoded.extra_pre_acts, (x @ W_enc + b_enc)[:, EXTRA])


def test_hint_does_not_change_the_selection():
    x, W_enc, b_enc, _, _ = (tensor.detach() for tensor in inputs(rows=200))
    unhinted = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, per_row=False))
    for hint in (unhinted.threshold, 2 * unhinted.threshold, 0.01 * unhinted.threshold):  # type: ignore[operator]
        hinted = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False, hint))
        assert torch.equal(hinted.values, unhinted.values) and torch.equal(hinted.pattern.columns, unhinted.pattern.columns)
        assert hinted.threshold == unhinted.threshold


def test_gradients_in_reused_buffers_equal_those_in_new_tensors():
    gradients = []
    for pool in (None, compute.BufferPool()):
        for _ in range(2):  # the second time the buffers contain the first results
            x, W_enc, b_enc, origin, W_dec = inputs()
            encoded = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False), origin=origin, gradients=pool, rows=pool)
            error, _, _ = compute.squared_error(encoded.values, encoded.pattern, W_dec, origin, x, gradients=pool, rows=pool)
            error.backward()
            gradients.append((W_enc.grad.clone(), W_dec.grad.clone(), origin.grad.clone()))  # type: ignore[union-attr]
    for repeated in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], repeated, strict=True))


@pytest.mark.parametrize("left", [False, True])
def test_products_ignore_the_old_contents_of_their_buffer(left: bool):
    x, W_enc, b_enc, *_ = (tensor.detach() for tensor in inputs(d_sae=600))
    values, pattern, *_ = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False))
    acts = torch.zeros(24, 600, dtype=x.dtype).index_put((pattern.rows, pattern.columns), values)
    if left:
        dense, in_new_tensor = x.T @ acts, pattern.left_product(x, values)
        in_buffer = pattern.left_product(x, values, torch.full_like(in_new_tensor, torch.nan))
    else:
        dense, in_new_tensor = acts.T @ x, pattern.transposed_product(values, x)
        in_buffer = pattern.transposed_product(values, x, torch.full_like(in_new_tensor, torch.nan))
    assert torch.equal(in_buffer, in_new_tensor)
    torch.testing.assert_close(in_buffer, dense)


def test_autocast_lowers_the_precision_of_the_encoder_product_only():
    x, W_enc, b_enc, origin, W_dec = (tensor.detach().float().requires_grad_() for tensor in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        encoded = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False), origin=origin)
        error, _, _ = compute.squared_error(encoded.values, encoded.pattern, W_dec, origin, x)
        error.backward()
    expected_pre_acts = ((x - origin).bfloat16() @ W_enc.bfloat16()).float() + b_enc
    assert torch.equal(encoded.values, expected_pre_acts[encoded.pattern.rows, encoded.pattern.columns])
    assert error.dtype == W_dec.grad.dtype == W_enc.grad.dtype == torch.float32  # type: ignore[union-attr]
    difference = encoded.pattern.product(encoded.values.detach(), W_dec.detach()) + origin - x
    torch.testing.assert_close(error, difference.square().sum(1).mean())

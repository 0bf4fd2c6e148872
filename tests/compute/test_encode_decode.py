"""The exact kernels against the dense functions they stand for."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metasae_lightning import compute
from metasae_lightning.compute import row_chunks, topk
from metasae_lightning.compute import sparse_matrix as patterns


@given(st.integers(1, 3000), st.floats(0, 1.2), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_largest_is_topk_whatever_the_guess(size: int, share: float, zeros: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) >= zeros)
    count = min(size, int(share * size))
    expected = values.topk(count).values
    kept = values[compute.largest_indices(values, count)].sort(descending=True).values
    assert torch.equal(kept, expected[: len(kept)])
    assert not expected[len(kept) :].any()


# Every value that the guess looks at is large, or none is.
@pytest.mark.parametrize("seen", [0.0, 100.0])
def test_a_sample_that_misleads_changes_nothing(seen: float):
    values = torch.rand(topk.STRIDE * 100, generator=torch.Generator().manual_seed(0))
    values[:: topk.STRIDE] = seen
    kept = compute.largest_indices(values, 500)
    assert torch.equal(values[kept].sort().values, values.topk(500).values.sort().values)


def test_equal_values_are_kept_as_often_as_asked():
    values = torch.ones(1000)
    assert len(set(compute.largest_indices(values, 77).tolist())) == 77


@pytest.fixture(params=["one block", "many blocks", "a GPU's way"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small that borders fall everywhere, in rows and in latents; a GPU's are cut as well, and what it does is done here."""
    if request.param != "one block":
        monkeypatch.setattr(topk, "BLOCK", 60)
        monkeypatch.setattr(topk, "GPU_BLOCK", 60)
        monkeypatch.setattr(topk, "BLOCK_ROWS", 7)
        monkeypatch.setattr(patterns, "TRANSPOSED_ELEMENTS", 70)
        monkeypatch.setattr(row_chunks, "CHUNK_ELEMENTS", 50)
    with row_chunks.dry_run_scale(1.0, gpu=request.param == "a GPU's way"):
        yield


def inputs(rows: int = 24, d_in: int = 10, d_sae: int = 40, seed: int = 0) -> tuple[Tensor, ...]:
    """Rows, encoder, its bias, the origin and a decoder, in float64."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (rows, d_in), (d_in, d_sae), (d_sae,), (d_in,), (d_sae, d_in)
    return tuple(torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes)


def reference(given: tuple[Tensor, ...], k: float, *, per_row: bool, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula on dense matrices: what is kept and what it decodes to."""
    x, W_enc, b_enc, origin, W_dec = given
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


APART = torch.tensor([3, 7, 39])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("near", [None, 100.0, 1e-3, 1.5])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("per_row", [False, True])
def test_encode_and_decode_are_the_dense_formula_and_so_are_all_gradients(per_row: bool, scaled: bool, near: float | None):
    given_tensors = inputs()
    x, W_enc, b_enc, origin, W_dec = given_tensors
    scale = torch.rand(40, dtype=torch.float64) + 0.5 if scaled else None

    def ours(x: Tensor, W_enc: Tensor, b_enc: Tensor, origin: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rule = compute.TopKRule(3, per_row, near)
        found = compute.encode(x, W_enc, b_enc, rule, origin=origin, scale=scale, extra_latents=APART)
        rebuilt, rows = compute.decode(found.values, found.pattern, W_dec, APART)
        return rebuilt, found.extra_pre_acts, rows

    acts, expected = reference(given_tensors, 3, per_row=per_row, scale=scale)
    found = ours(*given_tensors)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], ((x - origin) @ W_enc + b_enc)[:, APART], rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(piece) for piece in found]
    dense = (expected, ((x - origin) @ W_enc + b_enc)[:, APART], W_dec[APART])
    gradients = torch.autograd.grad(sum((piece * w).sum() for piece, w in zip(found, weights, strict=True)), given_tensors)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(sum((piece * w).sum() for piece, w in zip(dense, weights, strict=True)), given_tensors)  # type: ignore[arg-type]
    for ours_, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(ours, given_tensors, fast_mode=True)
    assert (acts != 0).sum() > 40  # control: something was kept


@pytest.mark.usefixtures("blocks")
def test_squared_error_is_its_formula_and_so_are_its_gradients():
    x, W_enc, b_enc, origin, W_dec = inputs()
    acts, rebuilt = reference((x, W_enc, b_enc, origin, W_dec), 3, per_row=False, scale=None)
    rows, columns = acts.nonzero(as_tuple=True)
    pattern, values, b_dec = compute.Pattern(rows, columns, (24, 40)), acts[rows, columns].detach().requires_grad_(), origin
    error, off, apart = compute.squared_error(values, pattern, W_dec, b_dec, x, APART)
    torch.testing.assert_close(error, (rebuilt + b_dec - x).square().sum(1).mean())
    torch.testing.assert_close(off, (rebuilt + b_dec - x).detach())
    assert torch.equal(apart, W_dec[APART]) and not off.requires_grad

    def checked(values: Tensor, W_dec: Tensor, b_dec: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        error, _, rows = compute.squared_error(values, pattern, W_dec, b_dec, x, APART)
        return error, rows

    assert torch.autograd.gradcheck(checked, (values, W_dec, b_dec, x), fast_mode=True)


@pytest.mark.usefixtures("blocks")
@given(
    st.integers(1, 40), st.integers(1, 30), st.floats(0, 12), st.integers(0, 10_000), st.sampled_from(["plain", "ties", "one row", "none"])
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_what_is_kept_is_the_largest_of_the_batch(rows: int, latents: int, k: float, seed: int, kind: str):
    """Rows that keep far more than k, ties across the cut, and batches with nothing positive."""
    generator = torch.Generator().manual_seed(seed)
    pre = torch.randn(rows, latents, generator=generator, dtype=torch.float64)
    if kind == "ties":
        pre = (2 * pre).round()
    elif kind == "one row":
        pre[seed % rows] += 100
    elif kind == "none":
        pre = -pre.abs()
    count = min(int(k * rows), rows * latents)
    rule = compute.TopKRule(count / rows + 1e-9, per_row=False)
    found = compute.encode(pre, torch.eye(latents, dtype=torch.float64), torch.zeros(latents, dtype=torch.float64), rule)
    expected = pre.relu().flatten().topk(count).values
    expected = expected[expected > 0]
    assert torch.equal(found.values.sort(descending=True).values, expected)
    places = found.pattern.rows * latents + found.pattern.columns
    assert torch.equal(places, places.unique())  # each once, in order
    assert torch.equal(pre.flatten()[places], found.values)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("near", [None, 1e-3, 1.09])
def test_a_cut_that_rises_on_the_way_loses_nothing_that_lies_close(near: float | None):
    """All activations within a tenth of each other: candidates are thinned out again and again, and the cut is as near as any."""
    pre = 1 + torch.rand(64, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 10
    found = compute.encode(
        pre, torch.eye(500, dtype=torch.float64), torch.zeros(500, dtype=torch.float64), compute.TopKRule(0.8, False, near)
    )
    assert torch.equal(found.values.sort(descending=True).values, pre.flatten().topk(51).values)


def test_a_bias_far_larger_than_what_is_left_of_it_loses_nothing():
    """1001.00006 - 1000 rounds to more than 1.00005."""
    x, W_enc, b_enc = torch.ones(1, 1), torch.tensor([[1001.000061, 1.000055]]), torch.tensor([-1000.0, 0.0])
    assert compute.encode(x, W_enc, b_enc, compute.TopKRule(1, False)).pattern.columns.tolist() == [0]


def test_what_is_wanted_apart_is_there_where_nothing_is_kept():
    x, W_enc, b_enc, _, _ = (piece.detach() for piece in inputs(rows=1))
    found = compute.encode(x, W_enc, b_enc, compute.TopKRule(0.5, False), extra_latents=APART)
    assert not len(found.values)
    torch.testing.assert_close(found.extra_pre_acts, (x @ W_enc + b_enc)[:, APART])


def test_a_cut_that_was_right_before_changes_nothing():
    x, W_enc, b_enc, _, _ = (piece.detach() for piece in inputs(rows=200))
    plain = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, per_row=False))
    for near in (plain.threshold, 2 * plain.threshold, 0.01 * plain.threshold):  # type: ignore[operator]
        again = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False, near))
        assert torch.equal(again.values, plain.values) and torch.equal(again.pattern.columns, plain.pattern.columns)
        assert again.threshold == plain.threshold


def test_gradients_in_lent_memory_are_those_in_new_memory():
    found = []
    for memory in (None, compute.BufferPool()):
        for _ in range(2):  # the second time the memory holds the first's
            x, W_enc, b_enc, origin, W_dec = inputs()
            kept = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False), origin=origin, gradients=memory, rows=memory)
            error, _, _ = compute.squared_error(kept.values, kept.pattern, W_dec, origin, x, gradients=memory, rows=memory)
            error.backward()
            found.append((W_enc.grad.clone(), W_dec.grad.clone(), origin.grad.clone()))  # type: ignore[union-attr]
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("turned", [False, True])
def test_what_lent_memory_held_does_not_matter(turned: bool):
    x, W_enc, b_enc, *_ = (piece.detach() for piece in inputs(d_sae=600))
    kept = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False))
    if turned:
        plain = kept.pattern.left_product(x, kept.values)
        found = kept.pattern.left_product(x, kept.values, torch.full_like(plain, torch.nan))
        dense = x.T @ torch.zeros(24, 600, dtype=x.dtype).index_put((kept.pattern.rows, kept.pattern.columns), kept.values)
    else:
        plain = kept.pattern.transposed_product(kept.values, x)
        found = kept.pattern.transposed_product(kept.values, x, torch.full_like(plain, torch.nan))
        dense = torch.zeros(24, 600, dtype=x.dtype).index_put((kept.pattern.rows, kept.pattern.columns), kept.values).T @ x
    assert torch.equal(found, plain)
    torch.testing.assert_close(found, dense)


def test_under_autocast_the_encoder_alone_is_in_the_lower_type():
    x, W_enc, b_enc, origin, W_dec = (piece.detach().float().requires_grad_() for piece in inputs())
    with torch.autocast("cpu", torch.bfloat16):
        kept = compute.encode(x, W_enc, b_enc, compute.TopKRule(3, False), origin=origin)
        error, _, _ = compute.squared_error(kept.values, kept.pattern, W_dec, origin, x)
        error.backward()
    lower = ((x - origin).bfloat16() @ W_enc.bfloat16()).float() + b_enc
    assert torch.equal(kept.values, lower[kept.pattern.rows, kept.pattern.columns])
    assert error.dtype == W_dec.grad.dtype == W_enc.grad.dtype == torch.float32  # type: ignore[union-attr]
    rebuilt = kept.pattern.product(kept.values.detach(), W_dec.detach()) + origin - x
    torch.testing.assert_close(error, rebuilt.square().sum(1).mean())

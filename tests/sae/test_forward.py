"""The sparse forward pass computes the same losses and gradients as SAELens's own."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.sae import forward, pretrained
from metasae_lightning.sae.forward import DenseForward, SparseForward
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import D_IN, activations, config

TOP_K_FAMILY = ("topk", "batchtopk", "matryoshka_batchtopk")


def pair(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[SparseForward, DenseForward]:
    """The sparse and the dense forward pass of one SAE, with decoder rows of different lengths and nonzero biases."""
    sae: Any = pretrained.build(config(name, **settings), role="primary", seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(len(sae.W_dec), 1, generator=generator, dtype=dtype) + 0.5)
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=generator, dtype=dtype))
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=generator, dtype=dtype))
    sparse, dense = forward.forward_pass_for(sae, "sparse"), forward.forward_pass_for(copy.deepcopy(sae), "dense")
    assert isinstance(sparse, SparseForward) and isinstance(dense, DenseForward)
    return sparse, dense


def train_both(sparse: SparseForward, dense: DenseForward, z: Tensor, dead: Tensor) -> tuple[ForwardResult, ForwardResult]:
    """The results of a forward and a backward pass by each of the two."""
    results = []
    for forward_pass in (sparse, dense):
        for parameter in forward_pass.sae.parameters():
            parameter.grad = None
        results.append(forward_pass.train(z, dead=dead, step=0, fresh_gradients=True))
        results[-1].loss.backward()
    return results[0], results[1]


def assert_same(sparse: SparseForward, dense: DenseForward, z: Tensor, dead: Tensor, *, rtol: float) -> None:
    """Losses, codes, reconstruction, threshold and every gradient agree, to `rtol` of the largest entry of each tensor."""
    sparse_result, dense_result = train_both(sparse, dense, z, dead)
    assert set(sparse_result.losses) == set(dense_result.losses)

    def close(a: Tensor | None, b: Tensor | None, name_of_value: str) -> None:
        a, b = (torch.zeros(()) if tensor is None else tensor.detach() for tensor in (a, b))
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a.to(b), b, rtol=rtol, atol=rtol * largest, msg=lambda text: f"{name_of_value}: {text}")

    for name, value in dense_result.losses.items():
        close(sparse_result.losses[name], value, name)
    close(sparse_result.loss, dense_result.loss, "loss")
    close(sparse_result.reconstruction, dense_result.reconstruction, "reconstruction")
    assert torch.equal(sparse_result.codes.rows, dense_result.codes.rows) and torch.equal(
        sparse_result.codes.latents, dense_result.codes.latents
    )
    close(sparse_result.codes.values, dense_result.codes.values, "values")
    for (name, sparse_tensor), (_, dense_tensor) in zip(sparse.sae.named_parameters(), dense.sae.named_parameters(), strict=True):
        close(sparse_tensor.grad, dense_tensor.grad, name)
    for (name, sparse_tensor), (_, dense_tensor) in zip(sparse.sae.named_buffers(), dense.sae.named_buffers(), strict=True):
        close(sparse_tensor, dense_tensor, name)
    with torch.no_grad():
        for sparse_read, dense_tensor in zip(sparse.read(z)[1:], dense.read(z)[1:], strict=True):
            close(sparse_read, dense_tensor, "read")


def rows(kind: str, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A random batch, changed by `kind`: one large row, one row of zeros, or each row twice, which makes activations tie."""
    z = torch.randn(count, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    match kind:
        case "saturated":
            z[0] *= 50
        case "empty":
            z[0] = 0  # one row: between equal rows, which of the equal activations a top-k keeps is arbitrary
        case "ties":
            z = z[: max(1, count // 2)].repeat_interleave(2, 0)
    return z


@pytest.mark.parametrize("path", ["CPU", "GPU"])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", TOP_K_FAMILY)
@given(
    count=st.integers(2, 40).map(lambda half: 2 * half),
    d_sae=st.integers(8, 90),
    k=st.integers(1, 6),
    dead=st.sampled_from([0, 1, 5, 9, 1000]),
    kind=st.sampled_from(["plain", "saturated", "empty", "ties", "silent"]),
    centred=st.booleans(),
    of_level=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_losses_and_gradients_equal_those_of_saelens(
    name: str, rescaled: bool, path: str, count: int, d_sae: int, k: int, dead: int, kind: str, centred: bool, of_level: bool, seed: int
):
    config_args: dict[str, Any] = {"apply_b_dec_to_input": centred, "rescale_acts_by_decoder_norm": rescaled, "d_sae": max(d_sae, 9)}
    if name.startswith("matryoshka"):
        config_args["use_matryoshka_aux_loss"] = of_level
    mask = torch.zeros(config_args["d_sae"], dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))[:dead]] = True
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        sparse, dense = pair(name, seed=seed, dtype=dtype, **config_args)
        for forward_pass in (sparse, dense):
            forward_pass.sae.cfg.k = forward_pass.sae.activation_fn.k = min(k, 8)
            if kind == "silent":
                forward_pass.sae.b_enc.data.fill_(-1e3)
        z = rows(kind, count, dtype, seed)
        if dtype == torch.float32 and kind == "saturated" and dead:
            continue  # the auxiliary loss of a residual near 50: rounding of the subtraction exceeds 1e-5
        with dry_run_scale(1.0, gpu=path == "GPU"):
            assert_same(sparse, dense, z, mask, rtol=rtol)


def test_the_comparison_fails_for_a_changed_decoder_row():
    sparse, dense = pair("batchtopk")
    with torch.no_grad():
        dense.sae.W_dec[3] *= 1.001
    with pytest.raises(AssertionError):
        assert_same(sparse, dense, rows("plain", 40, torch.float64, 0), torch.zeros(48, dtype=torch.bool), rtol=1e-9)


# The sparse kernels implement three architectures.
@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu", "abstopk"])
def test_other_architectures_use_saelens_forward_pass(name: str):
    assert isinstance(forward.forward_pass_for(pretrained.build(config(name), role="primary", seed=0), "sparse"), DenseForward)


# A subclass of a supported architecture may compute something else.
def test_a_subclass_uses_saelens_forward_pass():
    sae = pretrained.build(config("batchtopk"), role="primary", seed=0)
    child = type("Child", (type(sae),), {})(sae.cfg)
    assert isinstance(forward.forward_pass_for(child, "sparse"), DenseForward)


def test_zero_grad_with_and_without_set_to_none_gives_equal_weights():
    decoders = []
    for keep in (False, True):
        learner = JointSAE(config("batchtopk")).primary
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
        zero_grad = optimizer.zero_grad
        optimizer.zero_grad = lambda keep=keep, zero_grad=zero_grad: zero_grad(set_to_none=not keep)  # type: ignore[method-assign]
        for i in range(5):
            learner.learn(activations(i), optimizer, backward=torch.Tensor.backward)
        decoders.append(learner.W_dec.detach().clone())
    assert torch.equal(decoders[0], decoders[1])


@pytest.mark.parametrize("name", TOP_K_FAMILY)
def test_gradients_of_micro_batches_are_summed(name: str):
    sparse, dense = pair(name)
    z, dead = rows("plain", 40, torch.float64, 3), torch.zeros(48, dtype=torch.bool)
    for i, part in enumerate(z.split(10)):
        for forward_pass in (sparse, dense):
            forward_pass.train(part, dead=dead, step=0, fresh_gradients=i == 0).loss.backward()
    for (name, sparse_parameter), (_, dense_parameter) in zip(sparse.sae.named_parameters(), dense.sae.named_parameters(), strict=True):
        torch.testing.assert_close(sparse_parameter.grad, dense_parameter.grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", TOP_K_FAMILY)
def test_activations_of_another_type_are_cast_as_saelens_casts_them(name: str, dtype: torch.dtype):
    sparse, dense = pair(name, dtype=torch.float32)
    z, dead = activations(0).to(dtype), torch.zeros(48, dtype=torch.bool)
    assert_same(sparse, dense, z, dead, rtol=1e-5)
    torch.testing.assert_close(sparse.read(z)[1], dense.read(z)[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):  # control: other activations give another reconstruction
        torch.testing.assert_close(sparse.read(z)[1], dense.read(activations(1))[1], rtol=1e-5, atol=1e-5)

"""The sparse forward pass against SAELens's own, loss for loss and gradient for gradient."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metasae_lightning.sae import forward, pretrained
from metasae_lightning.sae.forward import DenseForward, SparseForward
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import D_IN, activations, config

FAMILY = ("topk", "batchtopk", "matryoshka_batchtopk")


def pair(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[SparseForward, DenseForward]:
    """The same SAE twice, its rows of different lengths and its biases away from 0."""
    sae: Any = pretrained.build(config(name, **settings), role="primary", seed=seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(len(sae.W_dec), 1, generator=generator, dtype=dtype) + 0.5)
        sae.W_enc.add_(0.3 * torch.randn(sae.W_enc.shape, generator=generator, dtype=dtype))
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=generator, dtype=dtype))
    fast, slow = forward.forward_pass_for(sae, "sparse"), forward.forward_pass_for(copy.deepcopy(sae), "dense")
    assert isinstance(fast, SparseForward) and isinstance(slow, DenseForward)
    return fast, slow


def both(fast: SparseForward, slow: DenseForward, z: Tensor, dead: Tensor) -> tuple[ForwardResult, ForwardResult]:
    """A step's forward and backward pass of each."""
    found = []
    for passes in (fast, slow):
        for parameter in passes.sae.parameters():
            parameter.grad = None
        found.append(passes.train(z, dead=dead, step=0, fresh_gradients=True))
        found[-1].loss.backward()
    return found[0], found[1]


def assert_same(fast: SparseForward, slow: DenseForward, z: Tensor, dead: Tensor, *, rtol: float) -> None:
    """Losses, codes, reconstruction, threshold and every gradient, to `rtol` of the largest of each."""
    ours, theirs = both(fast, slow, z, dead)
    assert set(ours.losses) == set(theirs.losses)

    def close(a: Tensor | None, b: Tensor | None, what: str) -> None:
        a, b = (torch.zeros(()) if piece is None else piece.detach() for piece in (a, b))
        largest = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a.to(b), b, rtol=rtol, atol=rtol * largest, msg=lambda text: f"{what}: {text}")

    for name, value in theirs.losses.items():
        close(ours.losses[name], value, name)
    close(ours.loss, theirs.loss, "loss")
    close(ours.reconstruction, theirs.reconstruction, "reconstruction")
    assert torch.equal(ours.codes.rows, theirs.codes.rows) and torch.equal(ours.codes.latents, theirs.codes.latents)
    close(ours.codes.values, theirs.codes.values, "values")
    for (name, own), (_, other) in zip(fast.sae.named_parameters(), slow.sae.named_parameters(), strict=True):
        close(own.grad, other.grad, name)
    for (name, own), (_, other) in zip(fast.sae.named_buffers(), slow.sae.named_buffers(), strict=True):
        close(own, other, name)
    with torch.no_grad():
        for mine, other in zip(fast.read(z)[1:], slow.read(z)[1:], strict=True):
            close(mine, other, "read")


def rows(kind: str, count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A batch: like any; one row far larger; nothing that fires; every row twice, so that activations tie; a row of zeros."""
    z = torch.randn(count, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    match kind:
        case "saturated":
            z[0] *= 50
        case "empty":
            z[::3] = 0
        case "ties":
            z = z[: max(1, count // 2)].repeat_interleave(2, 0)
    return z


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", FAMILY)
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
def test_losses_and_gradients_are_saelens_own(
    name: str, rescaled: bool, count: int, d_sae: int, k: int, dead: int, kind: str, centred: bool, of_level: bool, seed: int
):
    more: dict[str, Any] = {"apply_b_dec_to_input": centred, "rescale_acts_by_decoder_norm": rescaled, "d_sae": max(d_sae, 9)}
    if name.startswith("matryoshka"):
        more["use_matryoshka_aux_loss"] = of_level
    mask = torch.zeros(more["d_sae"], dtype=torch.bool)
    mask[torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))[:dead]] = True
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        fast, slow = pair(name, seed=seed, dtype=dtype, **more)
        for passes in (fast, slow):
            passes.sae.cfg.k = passes.sae.activation_fn.k = min(k, 8)
            if kind == "silent":
                passes.sae.b_enc.data.fill_(-1e3)
        z = rows(kind, count, dtype, seed)
        if dtype == torch.float32 and kind == "saturated" and dead:
            continue  # an auxiliary loss on an error of 50: rounding of what it is subtracted from is above 1e-5
        assert_same(fast, slow, z, mask, rtol=rtol)


def test_a_wrong_gradient_would_be_seen():
    fast, slow = pair("batchtopk")
    with torch.no_grad():
        slow.sae.W_dec[3] *= 1.001
    with pytest.raises(AssertionError):
        assert_same(fast, slow, rows("plain", 40, torch.float64, 0), torch.zeros(48, dtype=torch.bool), rtol=1e-9)


# What somebody makes of SAELens's classes may compute something else, and so may every other architecture.
@pytest.mark.parametrize("name", ["standard", "gated", "jumprelu", "abstopk"])
def test_others_go_through_saelens(name: str):
    assert isinstance(forward.forward_pass_for(pretrained.build(config(name), role="primary", seed=0), "sparse"), DenseForward)


def test_a_subclass_goes_through_saelens():
    sae = pretrained.build(config("batchtopk"), role="primary", seed=0)
    child = type("Child", (type(sae),), {})(sae.cfg)
    assert isinstance(forward.forward_pass_for(child, "sparse"), DenseForward)


def test_gradients_that_zero_grad_keeps_are_not_added_twice():
    found = []
    for keep in (False, True):
        learner = JointSAE(config("batchtopk")).primary
        optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
        plain = optimizer.zero_grad
        optimizer.zero_grad = lambda keep=keep, plain=plain: plain(set_to_none=not keep)  # type: ignore[method-assign]
        for i in range(5):
            learner.learn(activations(i), optimizer, backward=torch.Tensor.backward)
        found.append(learner.W_dec.detach().clone())
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", FAMILY)
def test_micro_batches_add_up_in_memory_of_their_own(name: str):
    fast, slow = pair(name)
    z, dead = rows("plain", 40, torch.float64, 3), torch.zeros(48, dtype=torch.bool)
    for i, part in enumerate(z.split(10)):
        for passes in (fast, slow):
            passes.train(part, dead=dead, step=0, alone=i == 0).loss.backward()
    for (what, own), (_, other) in zip(fast.sae.named_parameters(), slow.sae.named_parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12, msg=what)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_activations_of_another_type_are_cast_as_saelens_casts_them(name: str, dtype: torch.dtype):
    fast, slow = pair(name, dtype=torch.float32)
    z, dead = activations(0).to(dtype), torch.zeros(48, dtype=torch.bool)
    assert_same(fast, slow, z, dead, rtol=1e-5)
    torch.testing.assert_close(fast.read(z)[1], slow.read(z)[1], rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):  # control: other activations are something else
        torch.testing.assert_close(fast.read(z)[1], slow.read(activations(1))[1], rtol=1e-5, atol=1e-5)

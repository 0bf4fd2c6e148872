"""Penalties: their values and gradients, through the interface that JointSAE uses."""

import pytest
import torch

from metasae_lightning import functional
from metasae_lightning.penalties import Decomposability, Orthogonality


def rows(n: int = 40, d: int = 8) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_decomposability_hands_unit_rows_to_the_critic_and_averages():
    seen = []

    def critic(W: torch.Tensor) -> torch.Tensor:
        seen.append(W)
        assert not torch.is_grad_enabled()
        return 0.5 * W

    value = Decomposability(0.1, sigma_sq=2.0)(7 * rows(), critic, 0)
    torch.testing.assert_close(seen[0].norm(dim=-1), torch.ones(40, dtype=torch.float64))
    # half of each unit row is left over: e = 1/4, p = exp(-1/8)
    assert value.item() == pytest.approx(torch.exp(torch.tensor(-0.125)).item(), rel=1e-6)


def test_orthogonality_draws_new_chunks_each_step_and_the_same_for_the_same_step():
    penalty = Orthogonality(chunk_size=8)
    W = rows()
    assert penalty(W, None, 3) == penalty(W, None, 3)
    assert len({penalty(W, None, step).item() for step in range(5)}) == 5
    whole = Orthogonality(chunk_size=40)(W, None, 0)
    torch.testing.assert_close(whole, functional.orthogonality(W, [torch.arange(40)]).mean())


def test_orthogonality_every_fifth_step_is_five_times_as_strong():
    W = rows()
    every, fifth = Orthogonality(chunk_size=40), Orthogonality(chunk_size=40, every=5)
    assert [fifth(W, None, step).item() for step in range(1, 5)] == [0.0] * 4
    torch.testing.assert_close(fifth(W, None, 5), 5 * every(W, None, 5))


def test_descending_orthogonality_lowers_the_nearest_cosine():
    W = rows(20, 30).requires_grad_()
    penalty = Orthogonality(chunk_size=20)
    start = penalty(W, None, 0).item()
    optimizer = torch.optim.SGD([W], lr=10.0)
    for step in range(100):
        optimizer.zero_grad()
        penalty(W, None, step).backward()
        optimizer.step()
    assert penalty(W, None, 0).item() < 0.3 * start


# With and without an earlier gradient to add to. The reference is autograd through the drawn rows.
@pytest.mark.parametrize("before", [False, True])
def test_the_gradient_of_a_fraction_of_the_rows_equals_autograds(before: bool):
    W = functional.unit_rows(torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    penalty, drawn = Decomposability(0.3, 0.7, rows=0.25, seed=3), []

    def critic(rows: torch.Tensor) -> torch.Tensor:
        drawn.append(rows.clone())
        return 0.5 * rows.roll(1, 0)

    start = torch.ones_like(W) if before else torch.zeros_like(W)
    W.grad = start.clone() if before else None
    (2 * penalty(W, critic, 5)).backward()
    (chosen,) = drawn
    places = (chosen @ W.detach().T).argmax(1)
    assert len(places) == 10 == len(places.unique())
    other = W.detach().clone().requires_grad_()
    (2 * functional.decomposability(other[places], 0.5 * chosen.roll(1, 0), 0.7).mean()).backward()
    assert W.grad is not None and not W.grad.is_sparse
    torch.testing.assert_close(W.grad - start, other.grad, rtol=0, atol=1e-12)
    assert (other.grad != 0).any(1).sum() == 10

"""The exact kernels against the dense functions they stand for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes import batchtopk_sae

from metasae_lightning import saelens, sparse
from tests.architectures import config


@given(st.integers(1, 3000), st.floats(0, 1.2), st.floats(0, 1), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_largest_is_topk_whatever_the_guess(size: int, share: float, zeros: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(size, generator=generator) * (torch.rand(size, generator=generator) >= zeros)
    count = min(size, int(share * size))
    expected = values.topk(count).values
    kept = values[sparse.largest(values, count)].sort(descending=True).values
    assert torch.equal(kept, expected[: len(kept)])
    assert not expected[len(kept) :].any()


# Every value that the guess looks at is large, or none is.
@pytest.mark.parametrize("seen", [0.0, 100.0])
def test_a_sample_that_misleads_changes_nothing(seen: float):
    values = torch.rand(sparse.STRIDE * 100, generator=torch.Generator().manual_seed(0))
    values[:: sparse.STRIDE] = seen
    kept = sparse.largest(values, 500)
    assert torch.equal(values[kept].sort().values, values.topk(500).values.sort().values)


def test_equal_values_are_kept_as_often_as_asked():
    values = torch.ones(1000)
    assert len(set(sparse.largest(values, 77).tolist())) == 77


@pytest.mark.parametrize("k", [0.5, 3, 40])
def test_batchtopk_and_its_gradient_are_saelens_own(k: float):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))
    found = []
    for rule in (sparse.BatchTopK(k), batchtopk_sae.BatchTopK(k)):
        given_x = x.clone().requires_grad_()
        acts = rule(given_x)
        (acts * torch.arange(48)).sum().backward()
        found.append((acts.detach(), given_x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_training_saes_use_it(architecture: str):
    assert isinstance(saelens.build(config(architecture), role="primary", seed=0).activation_fn, sparse.BatchTopK)

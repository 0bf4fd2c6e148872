"""The units of an SAE: groups, signs and latents, and what the measures count."""

import copy
from types import SimpleNamespace

import pytest
import torch
from sae_lens import TopKTrainingSAEConfig

from metasae_lightning.architectures import Units
from metasae_lightning.errors import InputError


def test_a_group_fires_where_any_of_its_latents_does_and_its_activation_is_the_norm():
    units = Units(d_sae=6, group_size=3)
    acts = torch.tensor([[1.0, 2.0, -2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, -1.5, 0.0]])
    assert units.count == 2
    # sqrt(1 + 4 + 4) = 3
    assert units.activations(acts).tolist() == [[3.0, 0.0], [0.0, 1.5]]


def test_the_direction_of_a_group_is_that_of_its_largest_singular_value():
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(12, 8, generator=generator)
    directions = Units(d_sae=12, group_size=4).directions(W_dec)
    for block, direction in zip(W_dec.split(4), directions, strict=True):
        first = torch.linalg.svd(block).Vh[0]
        assert abs(first @ direction).item() == pytest.approx(1, abs=1e-5)
        # The control: the plain sum of rows is another direction. The sign is that of the sum.
        total = block.sum(0) / block.sum(0).norm()
        assert 0 < (total @ direction).item() < 0.999


def test_the_codes_of_a_direction_give_it():
    generator = torch.Generator().manual_seed(0)
    W_dec, groups = torch.randn(12, 8, generator=generator), Units(d_sae=12, group_size=4)
    codes = groups.codes_of_direction(2, W_dec)
    assert list(codes) == [8, 9, 10, 11]
    torch.testing.assert_close(torch.tensor(list(codes.values())) @ W_dec[8:], groups.directions(W_dec)[2])
    assert Units(d_sae=12).codes_of_direction(2, W_dec) == {2: 1.0}
    assert Units(d_sae=12, is_signed=True, by_polarity=True).codes_of_direction(14, W_dec) == {2: -1.0}


def test_signs_are_two_units_only_if_asked_for():
    cfg = SimpleNamespace(d_sae=2, has_signed_codes=True, architecture=lambda: "signed")
    acts = torch.tensor([[-2.0, 0.0], [3.0, -1.0]])
    assert Units.of(cfg).activations(acts).tolist() == [[2.0, 0.0], [3.0, 1.0]]
    by_polarity = Units.of(cfg, by_polarity=True)
    assert by_polarity.activations(acts).tolist() == [[0.0, 0.0, 2.0, 0.0], [3.0, 0.0, 0.0, 1.0]]
    assert by_polarity.directions(torch.eye(2)).tolist() == [[1, 0], [0, 1], [-1, 0], [0, -1]]
    assert by_polarity.count == 4


def test_an_ordinary_sae_has_its_latents_as_units_and_no_polarities():
    cfg = TopKTrainingSAEConfig(d_in=4, d_sae=8, k=2)
    units, acts, W_dec = Units.of(copy.deepcopy(cfg)), torch.rand(3, 8), torch.rand(8, 4)
    assert units.activations(acts) is acts
    assert units.directions(W_dec) is W_dec
    with pytest.raises(InputError, match="'topk' SAE has no latents with activations of both signs"):
        Units.of(cfg, by_polarity=True)

from itertools import islice

import pytest
import torch
from sae_lens.synthetic import (
    ConstantFiringProbabilityConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
)

from metasae_lightning.data import synthetic
from metasae_lightning.data.synthetic import SyntheticStream, plant
from metasae_lightning.errors import InputError

SPARSE = ConstantFiringProbabilityConfig(0.05)


def config(**changes) -> SyntheticModelConfig:
    return SyntheticModelConfig(**{"num_features": 24, "hidden_dim": 8, "firing_probability": SPARSE, "seed": 3, **changes})


def stream(**changes) -> SyntheticStream:
    return SyntheticStream(plant(config()), **{"tokens": 100, "batch_size": 16, **changes})


def batches(stream, count=None):
    return [batch.activations for batch in islice(stream, count)]


def test_batches_depend_on_the_seed_only_and_leave_the_global_rng_unchanged():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first_pass = batches(stream())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first_pass, batches(stream()), strict=True))
    assert [tuple(batch.shape) for batch in first_pass] == [(16, 8)] * 6  # 100 // 16
    assert torch.equal(stream().features, SyntheticModel(config()).feature_dict.feature_vectors.detach())


def test_activations_are_nonnegative_combinations_of_the_true_features():
    # More dimensions than features: each activation, less the bias, is a non-negative combination of the rows of `features`.
    model = plant(config(num_features=6, hidden_dim=32))
    activations = SyntheticStream(model, tokens=64, batch_size=64).batch(0).activations - model.feature_dict.bias
    codes = activations @ torch.linalg.pinv(model.feature_dict.feature_vectors)
    torch.testing.assert_close(codes @ model.feature_dict.feature_vectors, activations, atol=1e-5, rtol=1e-5)
    assert codes.min() > -1e-5
    assert codes.max() > 0.9


def test_held_out_batches_have_the_feature_activations_that_generated_them():
    model = plant(config(bias=0.5), shared_subspaces=2)
    held_out = SyntheticStream(model, split="validation", tokens=100, batch_size=16)
    for i, batch in enumerate(held_out):
        assert batch.features is not None and batch.features.shape == (16, 24)
        firings = torch.zeros(batch.features.shape)
        firings[batch.features.rows, batch.features.latents] = batch.features.values
        assert torch.equal(model.feature_dict(firings), batch.activations)
        # Returning the firings draws no random numbers: activations equal SAELens's own samples bit for bit.
        with torch.random.fork_rng():
            torch.manual_seed(synthetic._seed(0, "validation", 0, i))
            assert torch.equal(model.sample(16), batch.activations)
    assert {batch.features for batch in SyntheticStream(model, tokens=100, batch_size=16)} == {None}


def test_a_batch_depends_on_seed_split_rank_and_index():
    base = stream().batch(2).activations
    assert torch.equal(base, batches(stream(), 3)[2])
    for other in (stream(seed=1), stream(split="validation"), stream(rank=1)):
        assert not torch.equal(base, other.batch(2).activations)
    assert not torch.equal(base, stream().batch(1).activations)


def test_interrupted_and_restored_streams_yield_the_remaining_batches():
    expected = batches(stream())
    interrupted = stream()
    first = batches(interrupted, 2)
    restored = stream()
    restored.load_state_dict(interrupted.state_dict())
    for remaining in (batches(restored), batches(interrupted)):
        assert all(torch.equal(a, b) for a, b in zip(first + remaining, expected, strict=True))
    held_out = stream(split="test")
    assert torch.equal(batches(held_out, 2)[0], batches(held_out, 2)[0])


def test_features_in_one_subspace_have_the_cosine_of_the_formula():
    # 4 subspaces, sharing 1: cosine 1 / (1 + 1) = 0.5 inside a subspace and 0 across, with standard deviation 1 / sqrt(4096) = 0.016.
    independent = config(num_features=16, hidden_dim=4096)
    model = plant(independent, shared_subspaces=4, sharing=1.0)
    cosines = model.feature_dict.feature_vectors @ model.feature_dict.feature_vectors.T
    torch.testing.assert_close(cosines.diag(), torch.ones(16))
    n_near = ((cosines > 0.4) & (cosines < 0.6)).sum(1)
    n_far = (cosines.abs() < 0.1).sum(1)
    assert n_near.tolist() == [3] * 16  # 16 features, 4 in each subspace
    assert n_far.tolist() == [12] * 16
    # The control: without sharing no two features overlap.
    unshared = plant(independent).feature_dict.feature_vectors
    assert ((unshared @ unshared.T).abs() > 0.1).sum() == 16


def test_planted_features_depend_on_the_configs_seed_or_else_on_the_argument():
    def features(seed, config_seed=3):
        return plant(config(seed=config_seed), shared_subspaces=2, seed=seed).feature_dict.feature_vectors

    assert torch.equal(features(0), features(1))
    assert torch.equal(features(0, None), features(0, None))
    assert not torch.equal(features(0, None), features(1, None))


def test_plant_works_under_no_grad_and_inference_mode():
    # SAELens orthogonalises by gradient descent; Lightning builds validation data under no_grad.
    with torch.no_grad():
        plant(config(orthogonalization=OrthogonalizationConfig(num_steps=2)))
    with torch.inference_mode():
        assert not plant(config(orthogonalization=OrthogonalizationConfig(num_steps=2))).feature_dict.feature_vectors.is_inference()


def test_arguments_out_of_range_are_refused():
    with pytest.raises(InputError, match="got tokens=10, batch_size=16"):
        stream(tokens=10)
    with pytest.raises(InputError, match="shared_subspaces must be 0 or more, got -1"):
        plant(config(), shared_subspaces=-1)
    with pytest.raises(InputError, match=r"^sharing must be 0 or more, got nan"):
        plant(config(), shared_subspaces=2, sharing=float("nan"))
    with pytest.raises(InputError, match=r"^model.std_firing_magnitudes must be 0 or more, got -0.5"):
        plant(config(std_firing_magnitudes=-0.5))

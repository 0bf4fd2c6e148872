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


def test_batches_are_saelens_samples_of_a_known_seed_and_nothing_else_moves():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    given = batches(stream())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(given, batches(stream()), strict=True))
    assert [tuple(batch.shape) for batch in given] == [(16, 8)] * 6  # 100 // 16
    assert torch.equal(stream().features, SyntheticModel(config()).feature_dict.feature_vectors.detach())


def test_activations_are_sums_of_the_true_features():
    # More dimensions than features: each activation, less the bias, is a non-negative combination of the rows of `features`.
    model = plant(config(num_features=6, hidden_dim=32))
    given = SyntheticStream(model, tokens=64, batch_size=64).batch(0).activations - model.feature_dict.bias
    codes = given @ torch.linalg.pinv(model.feature_dict.feature_vectors)
    torch.testing.assert_close(codes @ model.feature_dict.feature_vectors, given, atol=1e-5, rtol=1e-5)
    assert codes.min() > -1e-5
    assert codes.max() > 0.9


def test_held_out_batches_come_with_the_firings_that_made_them():
    model = plant(config(bias=0.5), shared_subspaces=2)
    held_out = SyntheticStream(model, split="validation", tokens=100, batch_size=16)
    for i, batch in enumerate(held_out):
        assert batch.features is not None and batch.features.shape == (16, 24)
        firings = torch.zeros(batch.features.shape)
        firings[batch.features.rows, batch.features.latents] = batch.features.values
        assert torch.equal(model.feature_dict(firings), batch.activations)
        # Handing them out draws nothing: the bits are those of SAELens's plain samples.
        with torch.random.fork_rng():
            torch.manual_seed(synthetic._seed(0, "validation", 0, i))
            assert torch.equal(model.sample(16), batch.activations)
    assert {batch.features for batch in SyntheticStream(model, tokens=100, batch_size=16)} == {None}


def test_batch_i_is_a_function_of_seed_split_rank_and_i():
    base = stream().batch(2).activations
    assert torch.equal(base, batches(stream(), 3)[2])
    for other in (stream(seed=1), stream(split="validation"), stream(rank=1)):
        assert not torch.equal(base, other.batch(2).activations)
    assert not torch.equal(base, stream().batch(1).activations)


def test_restored_and_interrupted_streams_go_on_where_they_were():
    whole = batches(stream())
    interrupted = stream()
    first = batches(interrupted, 2)
    again = stream()
    again.load_state_dict(interrupted.state_dict())
    for rest in (batches(again), batches(interrupted)):
        assert all(torch.equal(a, b) for a, b in zip(first + rest, whole, strict=True))
    held_out = stream(split="test")
    assert torch.equal(batches(held_out, 2)[0], batches(held_out, 2)[0])


def test_features_of_a_subspace_overlap_as_the_formula_says():
    # 4 subspaces, sharing 1: cosine 1 / (1 + 1) = 0.5 inside a subspace and 0 across, give or take 1 / sqrt(4096) = 0.016.
    independent = config(num_features=16, hidden_dim=4096)
    model = plant(independent, shared_subspaces=4, sharing=1.0)
    cosines = model.feature_dict.feature_vectors @ model.feature_dict.feature_vectors.T
    torch.testing.assert_close(cosines.diag(), torch.ones(16))
    near = ((cosines > 0.4) & (cosines < 0.6)).sum(1)
    far = (cosines.abs() < 0.1).sum(1)
    assert near.tolist() == [3] * 16  # 16 features dealt evenly to 4
    assert far.tolist() == [12] * 16
    # The control: without sharing no two features overlap.
    plain = plant(independent).feature_dict.feature_vectors
    assert ((plain @ plain.T).abs() > 0.1).sum() == 16


def test_planting_is_a_function_of_the_configs_seed_or_of_ours():
    def features(ours, theirs=3):
        return plant(config(seed=theirs), shared_subspaces=2, seed=ours).feature_dict.feature_vectors

    assert torch.equal(features(0), features(1))
    assert torch.equal(features(0, None), features(0, None))
    assert not torch.equal(features(0, None), features(1, None))


def test_planting_works_where_gradients_are_off():
    # SAELens orthogonalises by gradient descent; Lightning builds validation data under no_grad.
    with torch.no_grad():
        plant(config(orthogonalization=OrthogonalizationConfig(num_steps=2)))
    with torch.inference_mode():
        assert not plant(config(orthogonalization=OrthogonalizationConfig(num_steps=2))).feature_dict.feature_vectors.is_inference()


def test_what_cannot_be_is_one_line():
    with pytest.raises(InputError, match="got tokens=10, batch_size=16"):
        stream(tokens=10)
    with pytest.raises(InputError, match="shared_subspaces must be 0 or more, got -1"):
        plant(config(), shared_subspaces=-1)

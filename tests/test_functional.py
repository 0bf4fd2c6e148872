"""The formulas against closed forms and other implementations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.synthetic import mean_correlation_coefficient
from sklearn.metrics import matthews_corrcoef, r2_score

from metasae_lightning import functional
from metasae_lightning.compute.row_passes import remove_radial, write_unit_rows
from metasae_lightning.metrics import DeadLatents, FeatureRecovery, Reconstruction
from metasae_lightning.step import Codes

shapes = st.tuples(st.integers(1, 12), st.integers(2, 16), st.integers(0, 10_000))


def random_rows(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(shapes, st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=50, deadline=None)
def test_decomposability_is_its_closed_form(shape: tuple[int, int, int], sigma_sq: float):
    n, d, seed = shape
    rows, critic = functional.unit_rows(random_rows(n, d, seed)), random_rows(n, d, seed + 1)
    expected = [math.exp(-sum((rows[i, j] - critic[i, j]).item() ** 2 for j in range(d)) / sigma_sq) for i in range(n)]
    torch.testing.assert_close(
        functional.decomposability(rows, critic, sigma_sq), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10
    )


@given(shapes, st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=50, deadline=None)
def test_penalty_gradient_is_its_closed_form(shape: tuple[int, int, int], sigma_sq: float):
    # d/dW_i of weight * mean p is -(2 weight / (n sigma_sq)) p_i (W_i - What_i); rows are normalised first, so on unit rows the
    # normalisation's Jacobian I - W W^T takes its radial part away.
    n, d, seed = shape
    rows = functional.unit_rows(random_rows(n, d, seed)).requires_grad_()
    critic = random_rows(n, d, seed + 1)
    weight = 0.3
    p = functional.decomposability(rows, critic, sigma_sq)
    (gradient,) = torch.autograd.grad(weight * p.mean(), rows)
    with torch.no_grad():
        closed = -(2 * weight / (n * sigma_sq)) * p[:, None] * (rows - critic)
        tangent = closed - (closed * rows).sum(-1, keepdim=True) * rows
    torch.testing.assert_close(gradient, tangent, rtol=0, atol=1e-10)
    # What is left pushes along the part of What orthogonal to W, away from it.
    away = critic.clone()
    remove_radial(away, rows)
    torch.testing.assert_close(gradient, (2 * weight / (n * sigma_sq)) * p.detach()[:, None] * away, rtol=0, atol=1e-10)


@given(shapes)
@settings(max_examples=25, deadline=None)
def test_rows_scaled_by_seven_are_judged_the_same(shape: tuple[int, int, int]):
    n, d, seed = shape
    rows, critic = random_rows(n, d, seed), random_rows(n, d, seed + 1)
    torch.testing.assert_close(
        functional.decomposability(7 * rows, critic, 1.0), functional.decomposability(rows, critic, 1.0), rtol=0, atol=1e-12
    )


def test_bounds_and_the_critic_that_is_the_decoder():
    rows = functional.unit_rows(random_rows(50, 8, 0)).requires_grad_()
    p = functional.decomposability(rows, rows.detach(), 1.0)
    (gradient,) = torch.autograd.grad(p.mean(), rows)
    torch.testing.assert_close(p, torch.ones_like(p), rtol=0, atol=1e-12)
    assert gradient.abs().max() < 1e-12
    # A critic that does no worse than zero keeps p within [exp(-1/sigma_sq), 1]; control: one that does worse falls below.
    shrunk = rows.detach() * torch.rand(50, 1, dtype=torch.float64)
    for sigma_sq in (0.3, 1.0, 3.0):
        inside = functional.decomposability(rows, shrunk, sigma_sq)
        assert inside.min() >= math.exp(-1 / sigma_sq) and inside.max() <= 1
        assert functional.decomposability(rows, -rows, sigma_sq).max() < math.exp(-1 / sigma_sq)


def test_gradient_is_largest_where_the_error_is_half_of_sigma_sq():
    # |g| is proportional to exp(-e/s) sqrt(e) before the radial projection: its maximum over e lies at s/2.
    errors = torch.linspace(0.01, 3, 3000, dtype=torch.float64)
    for sigma_sq in (0.3, 1.0, 3.0):
        strength = torch.exp(-errors / sigma_sq) * errors.sqrt()
        assert abs(errors[strength.argmax()] - sigma_sq / 2) < 2e-3


def test_orthogonality_is_the_nearest_cosine_in_each_chunk():
    rows = random_rows(9, 5, 0)
    chunks = [torch.tensor([0, 3, 4, 8]), torch.tensor([1, 2, 5, 6]), torch.tensor([7])]
    scores = functional.orthogonality(rows, chunks)
    for chunk in chunks:
        for i in chunk.tolist():
            cosines = [torch.cosine_similarity(rows[i], rows[j], dim=0).item() for j in chunk.tolist() if j != i]
            assert scores[i].item() == pytest.approx(max(cosines) ** 2 if cosines else 0.0, abs=1e-12)


def test_orthogonality_gradient_against_numerical_differences():
    rows = random_rows(6, 4, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: functional.orthogonality(W, [torch.arange(3), torch.arange(3, 6)]), (rows,))


@pytest.mark.filterwarnings("ignore:A single label was found")  # scikit-learn, on events that never or always happen
def test_phi_is_matthews_correlation_and_broadcasts():
    events = torch.rand(200, 7, generator=torch.Generator().manual_seed(0)) < torch.linspace(0, 1, 7)
    counts = events.double().T @ events.double()
    fired = counts.diagonal()
    ours = functional.phi(counts, fired[:, None], fired[None, :], 200.0)
    for i in range(7):
        for j in range(7):
            assert ours[i, j].item() == pytest.approx(matthews_corrcoef(events[:, i].numpy(), events[:, j].numpy()), abs=1e-9)


def test_fvu_from_batches_is_one_minus_r2_of_the_whole():
    x = random_rows(60, 5, 0) * torch.tensor([1.0, 5.0, 0.1, 2.0, 3.0]).double() + 4
    reconstruction = x + 0.3 * random_rows(60, 5, 1)
    metric = Reconstruction(5)
    for rows in (slice(0, 7), slice(7, 41), slice(41, 60)):
        metric.update(x[rows], reconstruction[rows], Codes.from_dense(torch.ones(x[rows].shape[0], 3)))
    expected = 1 - r2_score(x.numpy(), reconstruction.numpy(), multioutput="variance_weighted")
    assert metric.compute()["fvu"].item() == pytest.approx(expected, rel=1e-9)
    assert functional.fvu(x, reconstruction).item() == pytest.approx(expected, rel=1e-9)
    assert metric.compute()["l0"].item() == 3.0
    # Control: the mean of batch ratios is another number.
    ratios = [functional.fvu(x[rows], reconstruction[rows]).item() for rows in (slice(0, 7), slice(7, 41), slice(41, 60))]
    assert abs(sum(ratios) / 3 - expected) > 1e-4


def test_geometric_median_minimises_the_summed_distance_and_resists_outliers():
    x = random_rows(101, 3, 0)
    median = functional.geometric_median(x, iterations=1000, tolerance=1e-12)
    cost = (x - median).norm(dim=-1).sum()
    for step in 1e-3 * random_rows(20, 3, 1):
        assert (x - median - step).norm(dim=-1).sum() > cost
    shifted = torch.cat([x, torch.full((5, 3), 1e4, dtype=torch.float64)])
    assert (functional.geometric_median(shifted) - median).norm() < 0.2 < (shifted.mean(0) - median).norm()


def test_feature_recovery_is_saelens_mcc():
    features, decoder = random_rows(6, 8, 0).float(), random_rows(10, 8, 1).float()
    metric = FeatureRecovery(features)
    metric.update(decoder)
    assert metric.compute()["mcc"].item() == pytest.approx(float(mean_correlation_coefficient(decoder, features)), abs=1e-6)


def test_dead_latents_counts_what_never_fired():
    metric = DeadLatents(5)
    metric.update(Codes.from_dense(torch.tensor([[0.0, 1, 0, 0, 0], [0, 2, 0, 0, 0]])))
    metric.update(Codes.from_dense(torch.tensor([[0.0, 0, 0, 3, 0]])))
    assert metric.compute()["dead"].item() == pytest.approx(3 / 5)


def test_codes_are_the_dense_matrix_they_came_from():
    dense = torch.relu(random_rows(11, 9, 0)).float()
    for codes in (
        Codes.from_dense(dense),
        Codes.from_dense(dense.to_sparse_coo()),
        Codes.concatenate([Codes.from_dense(dense[:4]), Codes.from_dense(dense[4:5]), Codes.from_dense(dense[5:])]),
    ):
        rebuilt = torch.zeros(codes.shape)
        rebuilt[codes.rows, codes.latents] = codes.values
        torch.testing.assert_close(rebuilt, dense, rtol=0, atol=0)
        assert codes.firings().tolist() == (dense > 0).sum(0).tolist()
        assert codes.l0 == pytest.approx((dense > 0).sum().item() / 11)


def test_errors_are_told_by_quarters_of_norm_also_where_norms_are_equal():
    x = random_rows(4000, 6, 0) * torch.linspace(1, 50, 4000).double()[torch.randperm(4000), None]
    reconstruction = x + 0.5 * random_rows(4000, 6, 1)
    metric, codes = Reconstruction(6), Codes.from_dense(torch.ones(4000, 1))
    metric.update(x, reconstruction, codes)
    order = x.norm(dim=-1).argsort()
    for q, rows in enumerate(order.chunk(4)):
        expected = (x - reconstruction)[rows].square().sum() / x[rows].square().sum()
        assert metric.compute()[f"error_q{q + 1}"].item() == pytest.approx(expected.item(), rel=0.05)
    level = Reconstruction(6)
    level.update(functional.unit_rows(x), functional.unit_rows(x) * 0.9, codes)
    found = {name: value.item() for name, value in level.compute().items()}
    assert [found[f"error_q{q}"] for q in range(1, 5)] == pytest.approx([0.01] * 4)
    assert (found["cosine"], found["l2_ratio"], found["gamma"], found["l1"]) == pytest.approx((1.0, 0.9, 0.9, 1.0))


def test_gamma_is_what_reconstructions_should_be_divided_by():
    x = random_rows(200, 5, 0)
    reconstruction = 0.7 * x + 0.2 * random_rows(200, 5, 1)
    metric = Reconstruction(5)
    metric.update(x, reconstruction, Codes.from_dense(torch.ones(200, 1)))
    gamma = metric.compute()["gamma"].item()
    errors = {factor: (x - reconstruction / (gamma * factor)).square().sum().item() for factor in (0.99, 1.0, 1.01)}
    assert errors[1.0] == min(errors.values())


def test_dead_is_of_the_window_and_densities_of_everything():
    metric = DeadLatents(4, window=4)
    metric.update(Codes.from_dense(torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])))
    metric.update(Codes.from_dense(torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]])))
    metric.update(Codes.from_dense(torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 0]])))
    found = {name: value.item() for name, value in metric.compute().items()}
    assert found == {"dead": 3 / 4, "below_1e-05": 2 / 4, "below_1e-06": 2 / 4}  # the first fell silent, two never spoke
    assert metric.density().tolist() == pytest.approx([1 / 6, 3 / 6, 0, 0])


def test_orthogonalitys_gradient_is_the_same_bits_however_many_threads_add_to_it():
    """Many rows have one nearest: what they add to it must be added in one order."""
    rows = torch.randn(2000, 128, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), list[torch.Tensor]()
    torch.set_num_threads(2)
    try:
        for _ in range(10):
            leaf = rows.clone().requires_grad_()
            functional.orthogonality(leaf, [torch.arange(len(rows))]).sum().backward()
            found.append(leaf.grad)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)


def test_nearest_cosines_in_chunks_are_those_of_the_whole():
    rows = random_rows(37, 5, 0)
    cosines = functional.unit_rows(rows) @ functional.unit_rows(rows).T
    expected = cosines.fill_diagonal_(-2).amax(1)
    torch.testing.assert_close(functional.nearest_cosines(rows, rows=8), expected, rtol=0, atol=1e-12)


# By autograd of the formula itself, rows of any length, one of none, and a critic that is the decoder.
@given(shapes, st.sampled_from([0.3, 1.0, 3.0]))
@settings(max_examples=50, deadline=None)
def test_the_slope_of_decomposability_is_autograds(shape: tuple[int, int, int], sigma_sq: float):
    n, d, seed = shape
    rows = (random_rows(n, d, seed) * torch.linspace(0.1, 3, n, dtype=torch.float64)[:, None]).requires_grad_()
    for critic in (random_rows(n, d, seed + 1), functional.unit_rows(rows).detach(), torch.zeros(n, d, dtype=torch.float64)):
        p = functional.decomposability(rows, critic, sigma_sq)
        (gradient,) = torch.autograd.grad(p.sum(), rows)
        found, slope = functional.decomposability_with_slope(rows.detach(), critic, sigma_sq)
        torch.testing.assert_close(found, p.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(slope, gradient, rtol=0, atol=1e-10)
    single = functional.decomposability_with_slope(rows.detach().float(), critic.float(), sigma_sq)
    torch.testing.assert_close(single[1].double(), slope, rtol=0, atol=1e-5 * float(slope.abs().max()) + 1e-7)
    nothing = torch.zeros(1, 3, dtype=torch.float64)
    assert functional.decomposability_with_slope(nothing, nothing, sigma_sq)[0].item() == 1.0


def test_directions_can_be_made_in_memory_that_is_there():
    rows = torch.randn(3000, 300, generator=torch.Generator().manual_seed(0))
    rows[7] = 0
    into = torch.full_like(rows, torch.nan)
    assert write_unit_rows(rows, into) is into and torch.equal(into, functional.unit_rows(rows))
    assert torch.equal(write_unit_rows(rows, rows), into)

"""The sparsemax attention SAE: its formula, the mask, planted features of varying number, its computed decoder, export."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAEConfig, TopKTrainingSAEConfig, TrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.architectures import SparsemaxTrainingSAEConfig, Units
from metasae_lightning.architectures.sparsemax import SparsemaxTrainingSAE
from metasae_lightning.errors import InputError
from metasae_lightning.functional.sparsity import sparsemax, sparsemax_support
from metasae_lightning.penalties import Decomposability
from metasae_lightning.sae import export
from metasae_lightning.sae.forward import DenseForward
from metasae_lightning.sae.head_loss import add_head
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.architectures.short_training import trained

D_IN, D_SAE = 6, 15


def projection(scores: Tensor) -> Tensor:
    """The nearest point of the simplex by bisection: `max(s - t, 0)` sums to 1, and t lies between `max(s) - 1` and `max(s)`."""
    high = scores.amax(1, keepdim=True)
    low = high - 1
    for _ in range(100):
        middle = (low + high) / 2
        is_low = (scores - middle).clamp(min=0).sum(1, keepdim=True) > 1
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    return (scores - high).clamp(min=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Small scores have a support of more than 256, which is more than the first sort has.
@pytest.mark.parametrize("scale", [1e-4, 0.03, 1.0, 50.0])
def test_sparsemax_is_the_projection_onto_the_simplex(scale: float):
    scores = scale * normal(20, 600)
    p, wanted = sparsemax(scores), projection(scores)
    torch.testing.assert_close(p, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(p.sum(1), torch.ones(20, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(sparsemax_support(scores), wanted > 1e-12)
    sizes = (p > 0).sum(1)
    assert {1e-4: sizes.min() == 600, 0.03: sizes.min() > 5, 1.0: sizes.max() < 30, 50.0: sizes.max() < 3}[scale]


def test_masked_scores_are_left_out_and_a_row_of_them_has_no_support():
    scores = normal(4, 8)
    masked = scores.clone()
    masked[:, ::2] = -torch.inf
    torch.testing.assert_close(sparsemax(masked)[:, 1::2], projection(scores[:, 1::2]), rtol=0, atol=1e-9)
    assert (sparsemax(masked)[:, ::2] == 0).all()
    masked[0] = -torch.inf
    assert not sparsemax_support(masked)[0].any() and sparsemax_support(masked)[1:].any(1).all()
    assert (sparsemax(masked)[0] == 0).all()


def test_the_gradient_of_sparsemax_is_that_of_finite_differences():
    scores = normal(5, 7).requires_grad_()
    assert torch.autograd.gradcheck(sparsemax, scores)


def random_sae(**options: Any) -> SparsemaxTrainingSAE:
    """An SAE in float64 with random weights."""
    sae = SparsemaxTrainingSAE(SparsemaxTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64", **options))
    for seed, parameter in enumerate(sae.parameters()):
        parameter.data = 0.4 * normal(*parameter.shape, seed=seed)
    return sae


def forward(sae: SparsemaxTrainingSAE, x: Tensor) -> Any:
    return sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))


@pytest.mark.parametrize("scale_scores", [False, True])
def test_codes_loss_and_gradient_are_those_of_the_formula(scale_scores: bool):
    sae, x = random_sae(scale_scores=scale_scores), 3 * normal(50, D_IN, seed=9)
    sae.firing_rate[:3] = torch.tensor([0.2, 0.11, 0.09])  # two of them are masked
    norms = x.norm(dim=1, keepdim=True)
    K, V = sae.C @ sae.W_k, sae.C @ sae.W_v
    s = (x / norms) @ K.T / (D_IN**0.5 if scale_scores else 1)
    allowed = torch.arange(D_SAE) >= 2
    p = torch.zeros_like(s)
    p[:, allowed] = projection(s[:, allowed]).detach()
    a = s * (p > 1e-12)
    x_hat = a @ V * norms
    out = forward(sae, x)
    torch.testing.assert_close(out.feature_acts, a * norms, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.sae_out, x_hat, rtol=0, atol=1e-9)
    torch.testing.assert_close(sae.W_dec, V, rtol=0, atol=1e-9)
    # The public code averages over coordinates too: SAELens's convention is d_in times that.
    loss = 10 * ((x_hat - x) ** 2 / norms).mean()
    torch.testing.assert_close(out.loss, D_IN * loss, rtol=0, atol=1e-9)
    weights = [sae.C, sae.W_k, sae.W_v]
    for own, wanted in zip(torch.autograd.grad(out.loss, weights), torch.autograd.grad(D_IN * loss, weights), strict=True):
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-9)
    # Raw scores on the support may be negative, and the probabilities are other numbers: the control.
    assert (a < 0).any() and not torch.allclose(a, p)
    assert Units.of(sae.cfg).is_signed


def test_the_mask_follows_the_firing_rates_of_training_alone():
    sae, x = random_sae(max_rate=0.18, rate_decay=0.5), normal(200, D_IN, seed=9)
    codes = sae.encode(x)
    rate = (codes != 0).double().mean(0)
    assert 0 < (rate > 0.36).sum() < D_SAE and not sae.firing_rate.any()
    forward(sae, x)
    torch.testing.assert_close(sae.firing_rate, 0.5 * rate)
    assert torch.equal(sae.masked, rate > 0.36)
    rates = sae.firing_rate.clone()
    assert not sae.encode(x)[:, sae.masked].any() and codes[:, sae.masked].any(0).all()
    assert torch.equal(sae.firing_rate, rates)
    forward(sae, x[:0])  # a rank without rows
    assert torch.equal(sae.firing_rate, rates)
    sae.firing_rate.fill_(1)
    assert not sae.encode(x).any() and forward(sae, x).loss.isfinite()


def test_zero_tokens_are_reconstructed_as_zero():
    sae = random_sae()
    out = forward(sae, torch.zeros(3, D_IN, dtype=torch.float64))
    out.loss.backward()
    assert not out.sae_out.any() and all(parameter.grad.isfinite().all() for parameter in sae.parameters() if parameter.grad is not None)


def planted(features: Tensor, counts: range, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that are sums of some features, as many as one of `counts`, with a little noise; and these numbers."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(4096, 32, generator=generator).argsort(1)
    number = counts.start + torch.randint(0, len(counts), (4096, 1), generator=generator)
    values = (order < number) * (0.75 + 0.5 * torch.rand(4096, 32, generator=generator))
    return values @ features + 0.01 * torch.randn(4096, 32, generator=generator), number[:, 0].float()


def measured(cfg: TrainingSAEConfig, features: Tensor, counts: range) -> tuple[float, Tensor, Tensor]:
    """FVU, and the number of active latents and of features of each row, after training that starts near the features."""
    rows = torch.nn.functional.normalize(features + 0.05 * normal(32, 32, seed=3).float(), dim=1)

    def start(sae: Any) -> None:
        if isinstance(sae, SparsemaxTrainingSAE):
            sae.C.data, sae.W_k.data, sae.W_v.data = rows.clone(), torch.eye(32), torch.eye(32)
        else:
            sae.W_dec.data, sae.W_enc.data = rows.clone(), rows.T.contiguous()

    is_topk = isinstance(cfg, TopKTrainingSAEConfig)
    sae = trained(cfg, planted(features, counts, 0)[0], steps=150, lr=3e-3, unit_rows=is_topk, start=start)
    x, number = planted(features, counts, 1)
    codes = sae.encode(x)
    return functional.fvu(x, sae.decode(codes)).item(), (codes != 0).sum(1).float(), number


# Both SAEs start near the 32 features, so that this compares which latents fire, and not how features are found. A third of the latents
# fires on a token, more than any mask allows. The control has 10 features in each row.
def test_the_number_of_active_latents_follows_the_number_of_features():
    features = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(7))).Q
    attention = SparsemaxTrainingSAEConfig(d_in=32, d_sae=32, max_rate=1.0)

    def topk(k: int) -> TrainingSAEConfig:
        return TopKTrainingSAEConfig(d_in=32, d_sae=32, k=k, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=False)

    fvu, active, number = measured(attention, features, range(1, 21))
    assert active.mean() == pytest.approx(10.5, abs=0.5)
    assert torch.corrcoef(torch.stack([active, number]))[0, 1] > 0.95
    other, fixed, _ = measured(topk(11), features, range(1, 21))
    assert fixed.mean() > 10.5 and fvu < 0.2 * other
    control, active, _ = measured(attention, features, range(10, 11))
    other, _, _ = measured(topk(round(active.mean().item())), features, range(10, 11))
    assert control > 0.8 * other


def joint(**options: Any) -> JointSAE:
    primary = SparsemaxTrainingSAEConfig(d_in=16, d_sae=24, **options)
    meta = BatchTopKTrainingSAEConfig(d_in=16, d_sae=8, k=2, rescale_acts_by_decoder_norm=False)
    return JointSAE(primary, meta, {"it": Decomposability(weight=1.0, sigma_sq=1.0)}, n_p=2, n_m=1, decoder_rows="free", seed=1)


def step(module: JointSAE, count: int) -> None:
    optimizers = [torch.optim.Adam(learner.parameters(), lr=1e-2) for learner in (module.primary, module.meta) if learner is not None]
    for seed in range(count):
        module.step(Batch(normal(64, 16, seed=seed).float() + 0.5), *optimizers)


def test_the_gradient_of_a_penalty_flows_to_the_concepts_and_the_values():
    module = joint(max_rate=1.0)
    step(module, 4)
    sae: Any = module.primary.sae
    assert not sae.b_dec.any()  # the default `b_dec_init` sets parameters only
    W_dec, critic, number, ranks = module._penalty_args()  # pyright: ignore[reportPrivateUsage]
    loss, _ = module.penalties.loss(W_dec, critic, number, ranks)
    assert loss is not None and loss > 0
    C, W_k, W_v = torch.autograd.grad(loss, [sae.C, sae.W_k, sae.W_v], allow_unused=True)
    # The chain rule by hand: the gradient G of the decoder C W_v gives G W_v^T for C and C^T G for W_v.
    W_dec = sae.W_dec.detach().requires_grad_()
    loss, _ = module.penalties.loss(W_dec, critic, number, ranks)
    assert loss is not None
    (G,) = torch.autograd.grad(loss, W_dec)
    torch.testing.assert_close(C, G @ sae.W_v.T)
    torch.testing.assert_close(W_v, sae.C.T @ G)
    assert W_k is None and G.any()


def test_unit_rows_and_whitening_are_refused():
    cfg = SparsemaxTrainingSAEConfig(d_in=4, d_sae=8)
    with pytest.raises(InputError, match="decoder_rows: a 'sparsemax' SAE computes its decoder from other weights: set decoder_rows: free"):
        JointSAE(cfg)
    with pytest.raises(InputError, match="divides each token by its norm, which covariance_whitening changes"):
        SparsemaxTrainingSAEConfig(d_in=4, d_sae=8, normalize_activations="covariance_whitening")
    with pytest.raises(InputError, match="max_rate must be in"):
        SparsemaxTrainingSAEConfig(d_in=4, d_sae=8, max_rate=0.0)


@pytest.mark.parametrize("normalizer", ["none", "layer_norm", "expected_average_only_in"])
def test_the_exported_sae_has_the_same_codes_and_reconstruction(normalizer: Any, tmp_path: Path):
    module = joint(normalize_activations=normalizer, scale_scores=normalizer == "layer_norm", max_rate=0.5)
    step(module, 6)
    learner: Any = module.primary
    x = normal(100, 16, seed=99).float() + 0.5
    learner.sae.firing_rate[:5] = 0.6
    export.export(learner.sae, tmp_path / "sae", normalizer=learner.normalizer, updates=int(learner.updates))
    tensors = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    assert set(tensors) == {"W_enc", "W_dec", "b_dec", "is_masked"}
    assert tensors["is_masked"].tolist() == [True] * 5 + [False] * 19
    loaded = SAE.load_from_disk(str(tmp_path / "sae"))
    z, undo = learner.normalizer.normalize(x)
    with torch.no_grad():
        codes = learner.sae.encode(z)
        rebuilt = learner.normalizer.restore(learner.sae.decode(codes), undo)
    # One factor for all tokens leaves scores as they are, and codes grow with the token.
    factor = learner.normalizer.factor.float() if normalizer == "expected_average_only_in" else 1.0
    assert (codes != 0).sum() > 100 and not codes[:, :5].any()
    torch.testing.assert_close(loaded.encode(x), codes / factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(x), rebuilt, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="another support"):
        loaded.fold_W_dec_norm()


class FixedOutput(torch.nn.Module):
    """A head with one output for all codes."""

    def forward(self, codes: Any) -> Tensor:
        return normal(codes.shape[0], D_IN, seed=7)


@pytest.mark.parametrize("training", ["joint", "detached"])
def test_a_head_and_its_sae_have_one_error(training: Any):
    sae: Any = SparsemaxTrainingSAE(SparsemaxTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, decoder_init_norm=1.0)).double()
    # Norms of about 25: an error of weight 1 for the head beside 10 / ||x|| for the SAE would be another loss.
    x = 10 * normal(30, D_IN)
    result = DenseForward(sae).train(x, dead=torch.zeros(D_SAE, dtype=torch.bool), step=0, fresh_gradients=True)
    together = result.reconstruction + FixedOutput()(result.codes)
    wanted = (10 * (together - x).square().sum(1) / x.norm(dim=1)).mean()
    loss = add_head(result, FixedOutput(), x, training).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-9, atol=0)
    assert x.norm(dim=1).median() > 15

"""JointSAE without a trainer: the algorithm, its state, and checks of its arguments."""

import copy
from typing import Any

import pytest
import torch

from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Decomposability, Orthogonality
from metasae_lightning.step import Batch, StepOutput
from metasae_lightning.training import JointSAE
from metasae_lightning.training.argument_checks import check_choices
from tests.helpers.architectures import ARCHITECTURES, D_IN, activations, config, optimizers


def joint(primary: str = "batchtopk", meta: str | None = "batchtopk", weight: float = 0.3, **kw: Any) -> JointSAE:
    penalties = {} if meta is None else {"decomposability": Decomposability(weight)}
    settings = {"n_p": 3, "n_m": 2, "dead_after_tokens": 320, **kw}
    return JointSAE(config(primary), None if meta is None else config(meta, d_sae=12), settings.pop("penalties", penalties), **settings)


def train(module: JointSAE, steps: int, lr: float = 1e-3) -> list[StepOutput]:
    primary, meta = optimizers(module, lr)
    return [module.step(Batch(activations(i)), primary, meta, last=i == steps - 1) for i in range(steps)]


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("meta", ARCHITECTURES)
@pytest.mark.parametrize("primary", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_every_pair_of_architectures_trains(primary: str, meta: str):
    module = joint(primary, meta)
    before = weights(module)
    outputs = train(module, 20)
    for output in outputs:
        assert torch.isfinite(output.loss) and torch.isfinite(output.primary.fvu)
        assert all(torch.isfinite(value) for value in output.penalties.values())
    assert sum(output.meta is not None for output in outputs) == 7  # meta phases after steps 3, 6, ..., 18, and a shorter one after 20
    assert all(torch.isfinite(output.meta.loss) for output in outputs if output.meta is not None)
    for name, parameter in module.named_parameters():
        assert torch.isfinite(parameter).all(), name
        is_unused = "b_dec" in name and module.get_submodule(name.split(".")[0]).sae.cfg.architecture() == "matching_pursuit"
        if "W_dec" in name or "W_enc" in name or not is_unused:
            change = (parameter - before[name]).abs().max()
            assert change > 0 or name.endswith("b_dec"), name


def test_the_primary_optimiser_has_no_meta_parameter():
    module = joint()
    primary, meta = optimizers(module)
    primary_ids = {id(p) for group in primary.param_groups for p in group["params"]}
    meta_ids = {id(p) for p in module.meta.parameters()}  # type: ignore[union-attr]
    assert primary_ids and meta_ids and not primary_ids & meta_ids
    assert primary_ids | meta_ids == {id(p) for p in module.parameters()}
    assert meta is not None


@pytest.mark.parametrize("normalizer", ["layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"])
def test_a_critic_with_a_normaliser_works_from_the_first_step(normalizer: str):
    meta = config("batchtopk", d_sae=12, normalize_activations=normalizer)
    module = JointSAE(config("batchtopk"), meta, {"d": Decomposability(0.3)}, n_p=3, n_m=2)
    for output in train(module, 8):
        assert torch.isfinite(output.loss) and 0 < output.penalties["d"] <= 1
    assert torch.isfinite(module.primary.W_dec).all() and module.meta.initialized  # type: ignore[union-attr]


def test_the_decoder_gradient_has_no_radial_part_in_the_optimiser_step():
    module = joint()
    primary, meta = optimizers(module)
    radial_parts: list[torch.Tensor] = []
    primary.register_step_pre_hook(
        lambda *_: radial_parts.append((module.primary.W_dec.grad * module.primary.W_dec).sum(-1).detach().abs().max())
    )
    for i in range(3):
        module.step(Batch(activations(i)), primary, meta)
    assert max(radial_parts) < 1e-5


@pytest.mark.filterwarnings("ignore:a meta SAE without penalties")
def test_weight_zero_is_bit_equal_to_no_penalty_and_no_meta():
    control, bare, solo = joint(weight=0.0), joint(penalties={}), joint(meta=None)
    for module in (control, bare, solo):
        train(module, 50)
    for name, tensor in weights(solo.primary).items():
        assert torch.equal(weights(control.primary)[name], tensor), name
        assert torch.equal(weights(bare.primary)[name], tensor), name
    # Control: a weight other than 0 changes the result.
    weighted = joint(weight=0.3)
    train(weighted, 50)
    assert not torch.equal(weighted.primary.W_dec, solo.primary.W_dec)


@pytest.mark.parametrize("meta", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_computing_penalties_changes_no_state_and_no_gradient_of_the_meta_sae(meta: str):
    module = joint("batchtopk", meta, penalties={"d": Decomposability(0.3), "o": Orthogonality(0.25, chunk_size=16)})
    train(module, 7)
    for parameter in module.parameters():
        parameter.grad = None
    before, random_state = weights(module), torch.get_rng_state()
    values = [module.penalties.loss(*module._penalty_args()) for _ in range(25)]
    assert module.penalties.values_by_name(*module._penalty_args(), {}, critic_is_trained=True).keys() == {"d", "o"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value[0], values[0][0]) for value in values)
    values[0][0].backward()
    assert all(parameter.grad is None for parameter in module.meta.parameters())
    assert module.primary.W_dec.grad is not None


@pytest.mark.parametrize("primary", ["batchtopk", "jumprelu", "matching_pursuit"])
@pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
def test_decoder_rows_have_unit_norm_after_every_step(primary: str):
    module = joint(primary)
    optimizer, meta = optimizers(module, lr=0.05)
    for i in range(12):
        module.step(Batch(activations(i)), optimizer, meta)
        for learner in (module.primary, module.meta):
            assert (learner.W_dec.norm(dim=-1) - 1).abs().max() < 1e-6
    free = joint(decoder_rows="free")
    train(free, 5)
    assert (free.primary.W_dec.norm(dim=-1) - 1).abs().max() > 1e-4  # control


def test_decomposability_does_not_depend_on_the_norm_of_free_rows():
    module = joint(decoder_rows="free")
    train(module, 4)
    _, value = module.penalties.loss(*module._penalty_args())
    with torch.no_grad():
        module.primary.sae.W_dec.mul_(7)
    _, scaled = module.penalties.loss(*module._penalty_args())
    torch.testing.assert_close(scaled["decomposability"], value["decomposability"], rtol=1e-5, atol=1e-6)


def test_micro_batches_accumulate_the_gradient_of_the_full_batch():
    # TopK selects latents per token, so splitting the batch changes the order of sums only.
    unsplit, split = joint("topk"), joint("topk", micro_batches=4)
    for module in (unsplit, split):
        train(module, 6)
    torch.testing.assert_close(split.primary.W_dec, unsplit.primary.W_dec, rtol=0, atol=2e-5)
    assert int(split.primary.steps) == 6 and int(split.primary.rows_seen) == 6 * 64
    split_output, unsplit_output = train(split, 1)[0], train(unsplit, 1)[0]
    torch.testing.assert_close(split_output.loss, unsplit_output.loss, rtol=1e-4, atol=1e-5)
    assert split_output.codes.shape == unsplit_output.codes.shape and split_output.codes.l0 == unsplit_output.codes.l0


def test_clipping_bounds_each_saes_gradient_separately():
    module = joint(clip_grad_norm=1e-3)
    norms: list[float] = []
    primary = torch.optim.SGD(module.primary.parameters(), lr=1.0)
    meta = torch.optim.SGD(module.meta.parameters(), lr=1.0)  # type: ignore[union-attr]
    for optimizer in (primary, meta):
        optimizer.register_step_pre_hook(lambda opt, *_: norms.append(norm_of(opt)))
    module.step(Batch(activations(0)), primary, meta, last=True)
    assert norms == pytest.approx([1e-3] * 3, rel=1e-3)  # a primary step and n_m = 2 meta steps


def norm_of(optimizer: torch.optim.Optimizer) -> float:
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.cat([g.flatten() for g in grads]).norm().item()


@pytest.mark.parametrize(("b_dec_init", "is_near_mean"), [("mean", True), ("geometric_median", True), ("zeros", False)])
def test_decoder_bias_is_initialised_from_the_first_batch_only(b_dec_init: Any, is_near_mean: bool):
    module = joint(b_dec_init=b_dec_init)
    x = activations(0, rows=512) + 5
    module.primary.initialize(x)
    assert ((module.primary.sae.b_dec - x.mean(0)).norm() < 0.5) == is_near_mean
    initial = module.primary.sae.b_dec.clone()
    module.primary.initialize(x + 100)  # a second call changes nothing
    assert torch.equal(module.primary.sae.b_dec, initial)


def test_dead_latents_are_counted_in_tokens_and_counters_are_in_the_state():
    module = joint(meta=None, penalties={})
    with torch.no_grad():
        module.primary.sae.b_enc[:3] = -100.0  # these latents never fire
    optimizer, _ = optimizers(module)
    fired = torch.zeros(48, dtype=torch.bool)
    for i in range(6):
        output = module.step(Batch(activations(i, rows=40)), optimizer)
        fired |= output.codes.firings() > 0
    is_silent = module.primary.silent_for == 240
    assert torch.equal(is_silent, ~fired)
    assert "primary.silent_for" in module.state_dict() and "primary.updates" in module.state_dict()
    assert not module.primary.dead.any()  # the window is 320 tokens
    for i in range(6, 8):
        module.step(Batch(activations(i, rows=40)), optimizer)
    assert module.primary.silent_for[:3].tolist() == [320] * 3 and module.primary.dead.nonzero().flatten().tolist() == [0, 1, 2]


def test_running_statistics_count_forward_passes_and_coefficients_warm_up_in_steps():
    # L1's coefficient rises from 0 to 0.1 over 5 steps: step i has i / 5 of it.
    module = joint("standard", micro_batches=4)
    first, *_, last = train(module, 6)
    assert first.primary.losses["l1_loss"].item() == 0 and last.primary.losses["l1_loss"].item() > 0
    assert int(module.primary.steps) == 6 and int(module.primary.updates) == 24


def test_autocast_does_not_cache_weights_across_steps():
    module = joint("topk", meta=None, penalties={})
    optimizer, _ = optimizers(module, lr=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        module.step(Batch(activations(0)), optimizer)
        same_context = module.evaluate(Batch(activations(0))).reconstruction
    with torch.autocast("cpu", torch.bfloat16):
        new_context = module.evaluate(Batch(activations(0))).reconstruction
    assert torch.equal(same_context, new_context)


def test_evaluate_changes_no_state():
    module = joint()
    train(module, 5)
    before, random_state = weights(module), torch.get_rng_state()
    for i in range(5):
        module.evaluate(Batch(activations(100 + i)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_initial_weights_depend_on_the_seed_and_not_on_the_global_rng():
    torch.manual_seed(1)
    first = joint()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other_seed = joint(), joint(seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert not torch.equal(first.primary.W_dec, other_seed.primary.W_dec)


def test_a_macro_step_equals_the_algorithm_written_with_autograd():
    """One macro-step equals the paper's algorithm, written here with SAELens's own classes and plain autograd."""
    module = joint(n_p=1, n_m=1, penalties={"d": Decomposability(0.5, sigma_sq=0.7)}, b_dec_init="zeros", decoder_rows="free")
    primary, meta = copy.deepcopy(module.primary.sae), copy.deepcopy(module.meta.sae)  # type: ignore[union-attr]
    x = activations(3)
    module.step(Batch(x), *optimizers(module, lr=0.01))

    primary_optimizer, meta_optimizer = torch.optim.Adam(primary.parameters(), lr=0.01), torch.optim.Adam(meta.parameters(), lr=0.01)
    rows = primary.W_dec / primary.W_dec.norm(dim=-1, keepdim=True)
    with torch.no_grad():
        rebuilt = meta.decode(meta.encode(rows))
    penalty = torch.exp(-((rows - rebuilt) ** 2).sum(-1) / 0.7)
    acts, _ = primary.encode_with_hidden_pre(x)
    (((primary.decode(acts) - x) ** 2).mean() + 0.5 * penalty.mean()).mul(D_IN).backward()  # Adam is invariant to the scale
    primary_optimizer.step()
    rows = (primary.W_dec / primary.W_dec.norm(dim=-1, keepdim=True)).detach()
    acts, _ = meta.encode_with_hidden_pre(rows)
    ((meta.decode(acts) - rows) ** 2).sum(-1).mean().backward()
    meta_optimizer.step()
    torch.testing.assert_close(module.primary.W_dec, primary.W_dec, rtol=0, atol=1e-6)
    torch.testing.assert_close(module.meta.W_dec, meta.W_dec, rtol=0, atol=1e-6)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JointSAE(config("topk"), None, {"d": Decomposability(0.1)}), "penalties.d .* set model.meta"),
        (lambda: JointSAE(config("topk"), config("topk", d_in=8), {}), f"set d_in: {D_IN}"),
        (lambda: JointSAE(config("batchtopk", d_sae=3)), "primary.k must lie between 1 and d_sae=3, got 4"),
        (lambda: JointSAE(config("topk"), n_p=0), "n_p must be at least 1"),
        (  # with shape checks on, the annotation of JointSAE refuses it first
            lambda: check_choices(torch.nn.ModuleDict(), kernels="Sparse", critic_supports="exact"),
            "kernels must be sparse or dense, got 'Sparse'",
        ),
        (
            lambda: JointSAE(config("topk"), config("topk"), {"d": Decomposability(0.3, rows=0.5)}, critic_supports="macro_step"),
            "critic_supports: macro_step needs all rows, and penalties.d",
        ),
        (lambda: JointSAE(config("topk"), clip_grad_norm=0.0), "clip_grad_norm must be more than 0"),
        (lambda: JointSAE(config("topk", dtype="bfloat16")), "primary.dtype must be float32"),
        (lambda: JointSAE(config("topk", reshape_activations="hook_z")), "reshape_activations must be none"),
        (lambda: Decomposability(0.1, sigma_sq=0), "sigma_sq must be positive"),
        (lambda: Orthogonality(chunk_size=1), "chunk_size must be at least 2"),
    ],
)
def test_invalid_arguments_are_refused(make: Any, message: str):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_meta_sae_without_penalties_warns():
    with pytest.warns(UserWarning, match="a meta SAE without penalties"):
        JointSAE(config("topk"), config("topk", d_sae=8))

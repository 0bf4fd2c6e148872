"""The adaptive elastic net: its loss, weights and running mean, its export, and coherent dictionaries that leave L1 with dead latents."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor

from metasae_lightning.architectures.adaptive_elastic_net import (
    STATE,
    AdaptiveElasticNetTrainingSAE,
    AdaptiveElasticNetTrainingSAEConfig,
)
from metasae_lightning.compute.process_group import Parallelism, ProcessGroup
from metasae_lightning.errors import InputError
from metasae_lightning.functional.sparsity import adaptive_weights
from metasae_lightning.sae.learner import Learner
from metasae_lightning.sae.learner_config import LearnerConfig
from metasae_lightning.sae.nonfinite import NonFiniteGuard
from tests.helpers.ranks import in_process_group

D_IN, D_SAE = 6, 10
SETTINGS: dict[str, Any] = {
    **{"l1_coefficient": 0.7, "l2_coefficient": 0.3, "weight_warm_up_steps": 2, "weight_ramp_steps": 4, "ema_decay": 0.9},
    **{"weight_exponent": 0.5, "reference_fraction": 0.2, "min_weight": 0.5, "max_weight": 1.25},
}


def config(**changes: Any) -> AdaptiveElasticNetTrainingSAEConfig:
    return AdaptiveElasticNetTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, **{**SETTINGS, **changes})


def rows(step: int, count: int = 40) -> Tensor:
    return torch.randn(count, D_IN, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def random_sae(**changes: Any) -> AdaptiveElasticNetTrainingSAE:
    """A SAE in float64 in which no tensor has a default value."""
    sae = AdaptiveElasticNetTrainingSAE(config(**changes)).to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return sae


def forward(sae: AdaptiveElasticNetTrainingSAE, x: Tensor, step: int) -> Any:
    return sae.training_forward_pass(TrainStepInput(x, {"l1": 0.7, "l2": 0.3}, None, step, False))


def test_loss_gradient_and_running_mean_are_the_formulas_over_several_steps():
    sae = random_sae()
    W, D, b, c = (parameter.detach().clone() for parameter in (sae.W_enc, sae.W_dec, sae.b_dec, sae.b_enc))
    ema, seen = torch.ones(D_SAE, dtype=torch.float64), set[float]()
    for step in range(8):
        x = rows(step)
        h = ((x - b) @ W + c).clamp(min=0)
        # ref is the mean of the largest 0.2 * 10 = 2 running means; w lies between 0.5 and 1.25.
        ref = ema.sort(descending=True).values[:2].mean()
        w = 1 + ((ref / ema.clamp(min=1e-5)).sqrt().clamp(0.5, 1.25) - 1) * min(max((step - 2) / 4, 0), 1)
        error = h @ D + b - x
        expected = (error.square().sum() + 0.7 * (h * w).sum() + 0.3 * h.square().sum()) / len(x)
        out = forward(sae, x, step)
        torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
        # d loss / d h is 2 error D^T + 0.7 w + 0.6 h where h > 0: no gradient flows through w, which depends on earlier h.
        gradient = (2 * error @ D.T + 0.7 * w + 0.6 * h) * (h > 0) / len(x)
        sae.zero_grad()
        out.loss.backward()
        for parameter, expected_gradient in [
            (sae.W_enc, (x - b).T @ gradient),
            (sae.b_enc, gradient.sum(0)),
            (sae.W_dec, 2 * h.T @ error / len(x)),
        ]:
            torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(sae.activation_ema, ema, rtol=1e-9, atol=0)
        ema = 0.9 * ema + 0.1 * h.mean(0)
        seen |= set(w.tolist())
    # The control: by the end weights were at the upper limit, at 1, and between.
    assert max(seen) == 1.25 and 1.0 in seen and any(1 < value < 1.2 for value in seen)


@pytest.mark.parametrize("value", [1.0, 0.1, 3.7, 1e-4])
def test_weights_are_exactly_one_where_every_running_mean_is_the_reference(value: float):
    arguments: dict[str, Any] = {"exponent": 0.5, "reference_fraction": 0.3, "min_weight": 0.01, "max_weight": 10.0}
    assert (adaptive_weights(torch.full((1000,), value), **arguments) == 1).all()
    # The control: one larger mean changes the reference, hence all weights.
    assert (adaptive_weights(torch.tensor([value] * 9 + [2 * value]), **arguments) != 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"ema_decay": 1.0}, "ema_decay"), ({"reference_fraction": 0.0}, "reference_fraction"), ({"min_weight": 11.0}, "min_weight")],
)
def test_impossible_settings_are_refused_in_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(InputError, match=f"^{message} must be .*, got"):
        config(**changes)


def learner(micro_batches: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Learner, torch.optim.Optimizer]:
    made = Learner(config(), LearnerConfig(dead_after=10**6, micro_batches=micro_batches), role="primary", seed=0).to(dtype)
    return made, torch.optim.Adam(made.parameters(), lr=1e-2)


def learn(made: Learner, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        made.learn(rows(step).to(made.W_dec.dtype), optimizer, backward=Tensor.backward)


def test_micro_batches_move_the_running_mean_once_a_step_as_the_whole_batch_does():
    whole, parts = learner(), learner(micro_batches=3)
    learn(*whole, range(10))
    learn(*parts, range(10))
    for (name, expected), value in zip(whole[0].sae.state_dict().items(), parts[0].sae.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12, msg=name)
    ema: Any = whole[0].sae.activation_ema
    assert (ema != 1).all()


def test_reading_and_evaluation_do_not_move_the_running_mean():
    made, optimizer = learner()
    learn(made, optimizer, range(5))
    before = copy.deepcopy(made.sae.state_dict())
    made.read(rows(99))
    made.reconstruct(rows(98))
    made.sae(rows(97))
    assert all(torch.equal(value, before[name]) for name, value in made.sae.state_dict().items())
    learn(made, optimizer, range(5, 6))
    assert all(not torch.equal(made.sae.state_dict()[name], before[name]) for name in STATE if name != "step_rows")


def test_a_resumed_run_has_the_same_bits_as_one_that_never_stopped():
    whole, optimizer = learner(dtype=torch.float32)
    learn(whole, optimizer, range(5))
    state = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    learn(whole, optimizer, range(5, 10))
    resumed, resumed_optimizer = learner(dtype=torch.float32)
    resumed.load_state_dict(state[0])
    resumed_optimizer.load_state_dict(state[1])
    resumed.steps = 5
    learn(resumed, resumed_optimizer, range(5, 10))
    assert all(torch.equal(value, resumed.sae.state_dict()[name]) for name, value in whole.sae.state_dict().items())
    # The control: without the state of the running mean the weights differ.
    resumed.load_state_dict(state[0])
    resumed.sae.activation_ema.fill_(1)  # pyright: ignore
    resumed_optimizer.load_state_dict(state[1])
    resumed.steps = 5
    learn(resumed, resumed_optimizer, range(5, 10))
    assert not torch.equal(whole.W_dec, resumed.W_dec)


def test_a_skipped_step_leaves_no_trace_in_the_running_mean():
    (clean, clean_optimizer), (skipping, optimizer) = learner(), learner()
    skipping.guard = NonFiniteGuard()
    learn(clean, clean_optimizer, range(8))
    learn(skipping, optimizer, range(4))
    assert not skipping.learn(rows(50) * float("nan"), optimizer, backward=Tensor.backward).applied
    learn(skipping, optimizer, range(4, 8))
    assert all(torch.equal(value, skipping.sae.state_dict()[name]) for name, value in clean.sae.state_dict().items())


def train_on_rank(rank: int, folder: str) -> None:
    """Train with few of a batch's rows on the first rank and the others on the second, in two micro-batches on each."""
    made, optimizer = learner(micro_batches=2)
    made.join(Parallelism.of(ProcessGroup.default()), "global")
    for step in range(10):
        made.learn(rows(step)[slice(0, 10) if rank == 0 else slice(10, 40)], optimizer, backward=Tensor.backward)
    torch.save(made.sae.state_dict(), f"{folder}/{rank}.pt")


def test_two_ranks_with_uneven_parts_train_as_one_process_and_have_equal_weights_of_latents(tmp_path: Path):
    in_process_group(2, train_on_rank, tmp_path)
    one, _ = single = learner()
    learn(*single, range(10))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected: dict[str, Tensor] = dict(one.sae.state_dict())
    for name in expected:
        assert torch.equal(first[name], second[name]), name
    # The sums of the last step are divided by the number of ranks, and so is the number of its rows.
    assert (first["step_rows"], expected["step_rows"]) == (20, 40)
    for state in (first, expected):
        state["step_sums"] = state["step_sums"] / state.pop("step_rows")
    for name in first.keys() & expected.keys():
        torch.testing.assert_close(first[name], expected[name], rtol=1e-9, atol=1e-12, msg=name)

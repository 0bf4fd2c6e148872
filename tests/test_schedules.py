"""Schedules: meta phases, warm-up of penalties, and the learning rate."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens.training.optim import CoefficientScheduler

from metasae_lightning.errors import InputError
from metasae_lightning.schedules import WarmupDecay, meta_steps_after, meta_steps_in, warm_up


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 7))
def test_every_macro_step_ends_with_its_meta_phase(steps: int, n_p: int, n_m: int):
    turns = [meta_steps_after(step, n_p=n_p, n_m=n_m, last=step == steps) for step in range(1, steps + 1)]
    assert turns[-1] == n_m
    assert set(turns) <= {0, n_m}
    assert sum(turns) == meta_steps_in(steps, n_p=n_p, n_m=n_m)
    gaps = [i for i, turn in enumerate(turns, 1) if turn]
    assert all(b - a == n_p for a, b in zip([0, *gaps[:-2]], gaps[:-1], strict=False))


@given(st.integers(0, 20), st.floats(0.1, 5.0))
def test_warm_up_is_saelens_coefficient_schedule(steps: int, value: float):
    theirs = CoefficientScheduler(warm_up_steps=steps, final_value=value)
    for step in range(25):
        assert value * warm_up(step, steps) == pytest.approx(theirs.value)
        theirs.step()


def schedule(total: int, **shape: object) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    rates = []
    plan = WarmupDecay(optimizer, **shape)  # type: ignore[arg-type]
    plan.bind(total)
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    return rates


def test_warmup_decay_by_fraction_and_by_steps():
    by_steps = schedule(10, warmup=2, decay=5, shape="linear")
    # 2 * (1/2, 1, 1, 1, 1, 1, 4/5, 3/5, 2/5, 1/5)
    assert by_steps == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.6, 1.2, 0.8, 0.4])
    assert schedule(10, warmup=0.2, decay=0.5, shape="linear") == by_steps
    assert schedule(4, decay=0.5, shape="constant") == [2.0] * 4
    # cosine over 4 steps to a floor of a tenth: 2 * (0.1 + 0.9 * (1 + cos(pi s / 4)) / 2)
    assert schedule(4, decay=4, shape="cosine", floor=0.1)[2] == pytest.approx(2 * (0.1 + 0.9 * 0.5))


def test_a_resumed_schedule_has_the_length_of_the_new_run():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plan = WarmupDecay(optimizer)
    plan.bind(10)
    assert "total_steps" not in plan.state_dict()
    longer = WarmupDecay(optimizer)
    longer.bind(50)
    longer.load_state_dict(plan.state_dict())
    assert longer.total_steps == 50


def test_total_steps_wins_over_bind_and_invalid_arguments_are_refused():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plan = WarmupDecay(optimizer, total_steps=100)
    plan.bind(5)
    assert plan.total_steps == 100
    with pytest.raises(InputError, match="must not be negative"):
        WarmupDecay(optimizer, warmup=-1)
    with pytest.raises(InputError, match="warmup and decay take 8 and 5 steps, and the run has 10"):
        WarmupDecay(optimizer, warmup=8, decay=0.5).bind(10)

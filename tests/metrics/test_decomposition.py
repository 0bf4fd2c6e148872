"""The fresh critic: what can be taken apart, what cannot, and that it leaves everything else alone."""

import pytest
import torch

from metasae_lightning.errors import InputError
from metasae_lightning.functional import unit_rows
from metasae_lightning.metrics import Decomposition

QUICK = {"seeds": 2, "steps": 200, "batch_size": 64, "lr": 3e-3}


def composed(rows: int, atoms: int, d: int, parts: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    directions = unit_rows(torch.randn(atoms, d, generator=generator))
    chosen = torch.rand(rows, atoms, generator=generator).topk(parts).indices
    return directions[chosen].sum(1)


def figures(rows: torch.Tensor) -> dict[str, float]:
    metric = Decomposition(**QUICK)
    metric.update(7 * rows)  # directions count, lengths do not
    return {name: value.item() for name, value in metric.compute().items()}


def test_sparse_mixtures_are_explained_and_random_rows_are_not():
    mixed = figures(composed(256, 32, 64))
    atomic = figures(torch.randn(256, 64, generator=torch.Generator().manual_seed(1)))
    assert mixed["fve"] > mixed["random"] + 0.2
    assert mixed["fve"] > mixed["shuffled"] + 0.2
    # Random rows are their own null.
    assert abs(atomic["fve"] - atomic["random"]) < 0.05 and abs(atomic["fve"] - atomic["shuffled"]) < 0.05
    assert all(mixed[f"{name}_std"] < 0.05 for name in ("fve", "random", "shuffled"))


def test_compute_is_deterministic_and_keeps_the_random_state():
    rows, state = composed(64, 16, 32), torch.get_rng_state()
    assert figures(rows) == figures(rows)
    assert torch.equal(torch.get_rng_state(), state)


def test_invalid_arguments_are_errors():
    with pytest.raises(InputError, match="steps must be at least 1"):
        Decomposition(steps=0)
    with pytest.warns(UserWarning, match="compute"), pytest.raises(InputError, match="no decoder was seen"):
        Decomposition().compute()

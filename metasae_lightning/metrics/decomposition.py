"""How well a fresh meta SAE, which no decoder was trained against, takes decoder rows apart."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Adam
from torchmetrics import Metric

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.sae import BatchTopKTrainingSAEConfig
from metasae_lightning.sae.learner import Learner, LearnerConfig


class Decomposition(Metric):
    """Share of the variance of unit decoder rows that a fresh critic explains, beside two nulls; lower is more atomic.

    The critic is a BatchTopK SAE a quarter as wide as the rows are many, k 4, trained for 1,500 steps of 1,024 rows drawn with
    replacement: SAEBench's `meta_structure`. `fve` is its mean over critics of several seeds and `fve_std` their spread; `random` and
    `shuffled` the same for random directions and for the rows with each one's coordinates shuffled, which no critic can take apart but
    by their number.

    Args:
        seeds: Critics, for the rows and for each null.
        steps: Steps of each.
        batch_size: Rows of a step.
        share: Latents of a critic, as a share of the rows.
        k: Of them, how many rebuild a row.
        lr: Adam's learning rate.

    >>> metric = Decomposition(seeds=1, steps=20, batch_size=32)
    >>> metric.update(torch.eye(8).repeat(4, 1))
    >>> sorted(metric.compute())
    ['fve', 'fve_std', 'random', 'random_std', 'shuffled', 'shuffled_std']
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(
        self, *, seeds: int = 3, steps: int = 1500, batch_size: int = 1024, share: float = 0.25, k: int = 4, lr: float = 5e-4, **kwargs: Any
    ) -> None:
        # Every rank holds the same decoder: its own is the answer.
        super().__init__(**{"sync_on_compute": False, **kwargs})
        for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size), ("k", k)):
            if value < 1:
                raise InputError(f"Decomposition: {name} must be at least 1, got {value}")
        self.seeds, self.steps, self.batch_size, self.share, self.k, self.lr = seeds, steps, batch_size, share, k, lr
        self.add_state("rows", [], dist_reduce_fx=None)

    def update(self, W_dec: Float[Tensor, "d_sae d_in"]) -> None:
        """Take a decoder; the last one counts."""
        self.rows = [functional.unit_rows(W_dec.detach().float())]

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        found = {name: [self.explained(rows, seed) for seed in range(self.seeds)] for name, rows in self.judged().items()}
        return spread(found)

    def judged(self) -> dict[str, Float[Tensor, "d_sae d_in"]]:
        """The rows and the two nulls, by the name of their figure."""
        if not self.rows:
            raise InputError("Decomposition: no decoder was seen yet")
        (rows,) = self.rows
        generator = torch.Generator().manual_seed(0)
        random = functional.unit_rows(torch.randn(rows.shape, generator=generator)).to(rows)
        order = torch.rand(rows.shape, generator=generator).argsort(-1).to(rows.device)
        return {"fve": rows, "random": random, "shuffled": rows.gather(1, order)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a critic is a function of, but for its rows and seed."""
        return {name: getattr(self, name) for name in ("steps", "batch_size", "share", "k", "lr")}

    def explained(self, rows: Float[Tensor, "d_sae d_in"], seed: int) -> float:
        """FVE of these rows by one critic trained on them."""
        latents = max(self.k, math.ceil(self.share * len(rows)))
        cfg = BatchTopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=latents, k=self.k, device=str(rows.device))
        # As SAELens's own trainer has it: free rows, gradients clipped at 1, and dead so late that 1,500 steps know no auxiliary loss.
        dead = 2001 * self.batch_size
        with torch.enable_grad():
            config = LearnerConfig(dead_after=dead, decoder_rows="free", clip_grad_norm=1.0)
            critic = Learner(cfg, config, role="critic", seed=seed).to(rows.device)
            optimizer = Adam(critic.parameters(), lr=self.lr, fused=True)
            generator = torch.Generator().manual_seed(seed)
            critic.initialize(rows)
            for _ in range(self.steps):
                drawn = torch.randint(len(rows), (self.batch_size,), generator=generator)
                critic.learn(rows[drawn.to(rows.device)], optimizer, backward=lambda loss: loss.backward())
        return 1 - functional.fvu(rows, critic.reconstruct(rows)).item()


def spread(found: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Means, and standard deviations over critics.

    >>> {name: value.item() for name, value in spread({"fve": [1.0, 3.0]}).items()}
    {'fve': 2.0, 'fve_std': 1.4142135623730951}
    """
    figures: dict[str, Tensor] = {}
    for name, values in found.items():
        of_seeds = torch.tensor(values, dtype=torch.float64)
        figures |= {name: of_seeds.mean(), f"{name}_std": of_seeds.std(correction=int(len(values) > 1))}
    return figures

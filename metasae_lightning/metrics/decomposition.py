"""Torchmetric of how well a fresh meta SAE, which no decoder was trained against, rebuilds decoder rows."""

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
from metasae_lightning.sae.graphed_learner import GraphedLearner, can_be_graphed
from metasae_lightning.sae.learner import Learner, LearnerConfig

# Steps whose rows are drawn together.
DRAWN_AT_ONCE = 256


class Decomposition(Metric):
    """Fraction of the variance of unit decoder rows that a fresh meta SAE explains, beside two nulls; lower is more atomic.

    The fraction of variance explained is `1 - fvu`: 1 for exact reconstructions, 0 for the mean row.

    The meta SAE is a BatchTopK SAE with a quarter as many latents as there are rows, k 4, trained for 1,500 steps of 1,024 rows drawn
    with replacement, as in SAEBench's `meta_structure`. `fve` is the mean over meta SAEs of several seeds, `fve_std` their spread.
    `random` and `shuffled` are the same for random directions and for rows with shuffled coordinates, which have no structure to find.

    Args:
        seeds: Number of meta SAEs for the rows and for each null.
        steps: Training steps of each.
        batch_size: Rows in a step.
        share: Latents of a meta SAE, as a share of the number of rows.
        k: Active latents per row.
        lr: Adam's learning rate.
        cuda_graph: On a GPU, replay a training step as a CUDA graph: the same weights in less time.

    >>> metric = Decomposition(seeds=1, steps=20, batch_size=32)
    >>> metric.update(torch.eye(8).repeat(4, 1))
    >>> sorted(metric.compute())
    ['fve', 'fve_std', 'random', 'random_std', 'shuffled', 'shuffled_std']
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(
        self,
        *,
        seeds: int = 3,
        steps: int = 1500,
        batch_size: int = 1024,
        share: float = 0.25,
        k: int = 4,
        lr: float = 5e-4,
        cuda_graph: bool = True,
        **kwargs: Any,
    ) -> None:
        # Every rank has the same decoder, so nothing is synchronised.
        super().__init__(**{"sync_on_compute": False, **kwargs})
        for name, value in (("seeds", seeds), ("steps", steps), ("batch_size", batch_size), ("k", k)):
            if value < 1:
                raise InputError(f"Decomposition: {name} must be at least 1, got {value}")
        self.seeds, self.steps, self.batch_size, self.share, self.k, self.lr = seeds, steps, batch_size, share, k, lr
        self.cuda_graph = cuda_graph
        self.add_state("rows", [], dist_reduce_fx=None)

    def update(self, W_dec: Float[Tensor, "d_sae d_in"]) -> None:
        """Set the decoder; only the last one is used."""
        self.rows = [functional.unit_rows(W_dec.detach().float())]

    def compute(self) -> dict[str, Tensor]:
        """Train all meta SAEs; returns the variance explained of the rows and of both nulls, with standard deviations over seeds."""
        seeds, rows_by_name = range(self.seeds), self.decoder_and_nulls()
        return means_and_deviations({name: [self.variance_explained(rows, seed) for seed in seeds] for name, rows in rows_by_name.items()})

    def decoder_and_nulls(self) -> dict[str, Float[Tensor, "d_sae d_in"]]:
        """The decoder rows (`fve`) and the two nulls: random directions (`random`), and rows with shuffled coordinates (`shuffled`)."""
        if not self.rows:
            raise InputError("Decomposition: no decoder was seen yet")
        (rows,) = self.rows
        generator = torch.Generator().manual_seed(0)
        random = functional.unit_rows(torch.randn(rows.shape, generator=generator)).to(rows)
        order = torch.rand(rows.shape, generator=generator).argsort(-1).to(rows.device)
        return {"fve": rows, "random": random, "shuffled": rows.gather(1, order)}

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the fresh meta SAEs that this metric trains: steps, batch size, share of latents, k and learning rate."""
        return {name: getattr(self, name) for name in ("steps", "batch_size", "share", "k", "lr")}

    def variance_explained(self, rows: Float[Tensor, "d_sae d_in"], seed: int) -> float:
        """Fraction of variance explained of some rows by one meta SAE that is trained on them."""
        latents = max(self.k, math.ceil(self.share * len(rows)))
        cfg = BatchTopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=latents, k=self.k, device=str(rows.device))
        # As SAELens's trainer: free rows, gradients clipped at 1, and so long a dead window that 1,500 steps have no auxiliary loss.
        dead_after = 2001 * self.batch_size
        with torch.enable_grad():
            config = LearnerConfig(dead_after=dead_after, decoder_rows="free", clip_grad_norm=1.0)
            critic = Learner(cfg, config, role="critic", seed=seed).to(rows.device)
            optimizer = Adam(critic.parameters(), lr=self.lr, fused=True, capturable=rows.is_cuda)
            graphed = GraphedLearner(critic, optimizer) if self.cuda_graph and can_be_graphed(critic, rows) else None
            generator = torch.Generator().manual_seed(seed)
            critic.initialize(rows)
            for begin in range(0, self.steps, DRAWN_AT_ONCE):
                count = min(DRAWN_AT_ONCE, self.steps - begin)
                # Indices of many steps are copied together: the host waits for each copy to a GPU.
                for indices in torch.randint(len(rows), (count, self.batch_size), generator=generator).to(rows.device):
                    batch = rows.index_select(0, indices)
                    if graphed is not None:
                        graphed.learn(batch)
                    else:
                        critic.learn(batch, optimizer, backward=lambda loss: loss.backward())
        return 1 - functional.fvu(rows, critic.reconstruct(rows)).item()


def means_and_deviations(values_by_name: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """Means and standard deviations over meta SAEs; the standard deviation of a single value is 0.

    >>> {name: value.item() for name, value in means_and_deviations({"fve": [1.0, 3.0]}).items()}
    {'fve': 2.0, 'fve_std': 1.4142135623730951}
    """
    figures: dict[str, Tensor] = {}
    for name, values in values_by_name.items():
        over_seeds = torch.tensor(values, dtype=torch.float64)
        figures |= {name: over_seeds.mean(), f"{name}_std": over_seeds.std(correction=int(len(values) > 1))}
    return figures

"""What is added to the primary's loss: `Penalty` and its final children. The formulas are in `functional`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metasae_lightning import functional
from metasae_lightning.compute.buffers import LENT
from metasae_lightning.compute.process_group import Crew
from metasae_lightning.compute.row_chunks import mean_over_rows, order
from metasae_lightning.compute.sharding import own, share, whole
from metasae_lightning.errors import InputError
from metasae_lightning.schedules import warm_up

Critic = Callable[[Float[Tensor, "d_sae d_in"]], Float[Tensor, "d_sae d_in"]]
"""The frozen meta SAE: unit decoder rows in, their reconstruction out, no gradient, no state moved. Both are lent: the next use of
the critic may write over them."""


class Penalty(nn.Module, ABC):
    """A scalar on the primary's decoder, weighted and possibly warmed up.

    `weight` is the paper's: against a squared error that is a mean over `d_in` and the batch. Over the first `warm_up_steps` primary
    steps it rises linearly from 0. A weight of 0 leaves the run bit-equal to one without the penalty, and the value is still measured.
    """

    needs_critic: bool = False

    def __init__(self, weight: float, warm_up_steps: int = 0) -> None:
        super().__init__()
        if weight < 0 or warm_up_steps < 0:
            raise InputError(f"{type(self).__name__}: weight and warm_up_steps must not be negative, got {weight} and {warm_up_steps}")
        self.weight = weight
        self.warm_up_steps = warm_up_steps

    def setup(self, trainer: Any) -> None:
        """For a penalty that needs more of the run than the decoder and the critic; called once before training."""

    @abstractmethod
    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """The penalty's value at primary step `step` (from 0): a pure function of its arguments."""

    def rank_share(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, crew: Crew) -> Float[Tensor, ""]:
        """This rank's part: over ranks, parts and their gradients add up to the penalty's. One that cannot be divided is made by each.

        The decoder may be a DTensor, of which a rank has its rows alone.
        """
        value = self(whole(W_dec), critic, step)
        return value if crew.all.alone else value / crew.all.world_size


class Penalties(nn.ModuleDict):
    """Penalties by the names that they are logged under."""

    def named(self) -> list[tuple[str, Penalty]]:
        """Each with its name."""
        return list(self.items())  # pyright: ignore[reportReturnType]

    def loss(self, W_dec: Tensor, critic: Critic | None, step: int, crew: Crew) -> tuple[Tensor | None, dict[str, Tensor]]:
        """This rank's part of the weighted sum that joins the loss, or none where every weight is 0 now, and the value of each that does.

        Weights are the papers', whose squared error is a mean over `d_in`; SAELens's is a sum, hence the factor.
        """
        total: Tensor | None = None
        values: dict[str, Tensor] = {}
        for name, penalty in self.named():
            weight = W_dec.shape[1] * penalty.weight * warm_up(step, penalty.warm_up_steps)
            if weight == 0:
                continue
            value = penalty.rank_share(W_dec, critic, step, crew)
            values[name] = crew.all.summed(value)
            if value.requires_grad:  # one that acts now and then alone is a plain zero in between
                total = weight * value if total is None else total + weight * value
        return total, values

    @torch.no_grad()
    def values_by_name(
        self, W_dec: Tensor, critic: Critic | None, step: int, crew: Crew, known: dict[str, Tensor], *, critic_is_trained: bool
    ) -> dict[str, Tensor]:
        """Every penalty's value, those that are not known measured; one of weight 0 says nothing before its critic has `learnt`."""
        for name, penalty in self.named():
            if name not in known and (critic_is_trained or not penalty.needs_critic):
                known = {**known, name: crew.all.summed(penalty.rank_share(W_dec, critic, step, crew))}
        return known


@final
class Decomposability(Penalty):
    """Mean decomposability of the decoder rows by the critic, `mean_i exp(-||W_i - What_i||^2 / sigma_sq)` (arXiv 2604.03436).

    With `rows` < 1 the mean is over that share of the rows, drawn anew at each step: cheaper, unbiased but for the critic's threshold being
    that of the rows drawn, and noisy.
    """

    needs_critic = True

    def __init__(self, weight: float, sigma_sq: float = 1.0, warm_up_steps: int = 0, rows: float = 1.0, seed: int = 0) -> None:
        super().__init__(weight, warm_up_steps)
        if sigma_sq <= 0:
            raise InputError(f"Decomposability: sigma_sq must be positive, got {sigma_sq}")
        if not 0 < rows <= 1:
            raise InputError(f"Decomposability: rows is the share of the decoder that a step looks at, above 0 and up to 1, got {rows}")
        self.sigma_sq, self.rows, self.seed = sigma_sq, rows, seed

    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """See the class."""
        return self.rank_share(W_dec, critic, step, Crew())

    def rank_share(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, crew: Crew) -> Float[Tensor, ""]:
        """The mean over this rank's share of the rows, by that share."""
        assert critic is not None
        drawn, count, decoder = None, len(W_dec), own(W_dec)
        if self.rows < 1:
            count = max(1, round(self.rows * len(W_dec)))
            drawn = order(len(W_dec), step=step, seed=self.seed)[:count]
        chosen = share(W_dec, drawn, crew)
        with torch.no_grad():
            some = decoder if chosen is None else decoder.index_select(0, chosen)
            reconstruction = critic(functional.unit_rows(some, LENT.take("unit", some.shape, some)))

        def of_rows(rows: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
            return functional.decomposability_with_slope(rows, rebuilt.to(rows.dtype), self.sigma_sq)

        mean = mean_over_rows(of_rows, decoder, reconstruction, chosen)
        return mean if crew.all.alone else mean * (len(reconstruction) / count)


@final
class Orthogonality(Penalty):
    """Mean squared cosine of each row to its nearest neighbour within a random chunk, a new partition each step (arXiv 2509.22033).

    With `every` > 1 it acts on every so-manieth step only, `every` times as strongly.
    """

    def __init__(self, weight: float = 0.25, chunk_size: int = 8192, every: int = 1, seed: int = 0, warm_up_steps: int = 0) -> None:
        super().__init__(weight, warm_up_steps)
        if chunk_size < 2 or every < 1:
            raise InputError(f"Orthogonality: chunk_size must be at least 2 and every at least 1, got {chunk_size} and {every}")
        self.chunk_size, self.every, self.seed = chunk_size, every, seed

    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """See the class."""
        return self.rank_share(W_dec, critic, step, Crew())

    def rank_share(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, crew: Crew) -> Float[Tensor, ""]:
        """Each rank finds the neighbours of its share of every chunk, which are anywhere in the decoder."""
        if step % self.every:
            return own(W_dec).new_zeros(())
        W_dec = whole(W_dec)
        permuted = order(len(W_dec), step=step, seed=self.seed).to(W_dec.device)
        chunks = list(permuted.chunk(-(-len(permuted) // self.chunk_size)))
        shares = [crew.all.share(len(chunk)) for chunk in chunks]
        return self.every * functional.orthogonality(W_dec, chunks, shares).sum() / len(W_dec)

"""Penalties that are added to the primary's loss. Their formulas are in `functional`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metasae_lightning import functional
from metasae_lightning.compute.buffers import SHARED, buffer_or_new
from metasae_lightning.compute.gpu.host_reads import DeferredChecks, deferred_checks, is_deferring
from metasae_lightning.compute.gpu.neighbours import sum_of_squared_cosines
from metasae_lightning.compute.gpu.passes import passes_for
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_chunks import is_blocked, mean_over_rows, step_permutation
from metasae_lightning.compute.row_passes import write_unit_rows
from metasae_lightning.compute.sharding import full, local, local_rows
from metasae_lightning.compute.transfers import copy_to
from metasae_lightning.errors import InputError
from metasae_lightning.schedules import warm_up
from metasae_lightning.step import ExtraLoss, ExtraTerm

Critic = Callable[[Float[Tensor, "d_sae d_in"]], Float[Tensor, "d_sae d_in"]]
"""The frozen meta SAE as a function from unit decoder rows to their reconstruction. It computes no gradient and changes no state. The
result may lie in a buffer that the next call overwrites."""


class Penalty(nn.Module, ABC):
    """A scalar function of the primary's decoder that is added to the loss with a weight.

    `weight` is the weight in the paper, where the squared error is a mean over `d_in` and the batch. It rises linearly from 0 over the
    first `warm_up_steps` primary steps. With weight 0 a run is bit-equal to one without the penalty, and the value is still logged.
    """

    needs_critic: bool = False
    uses_step: bool = True
    """Whether the value depends on more than the decoder and the critic, such as the step's number. If not, a CUDA graph may replay it."""

    def __init__(self, weight: float, warm_up_steps: int = 0) -> None:
        super().__init__()
        if weight < 0 or warm_up_steps < 0:
            raise InputError(f"{type(self).__name__}: weight and warm_up_steps must not be negative, got {weight} and {warm_up_steps}")
        self.weight = weight
        self.warm_up_steps = warm_up_steps

    def setup(self, trainer: Any) -> None:
        """Called once before training, for a penalty that needs more of the run than the decoder and the critic. Default: nothing."""

    @abstractmethod
    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """The penalty's value at primary step `step` (from 0). A pure function of its arguments."""

    def rank_share(
        self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, parallelism: Parallelism
    ) -> Float[Tensor, ""]:
        """This rank's share: the sum of the shares over ranks is the penalty, for values and for gradients.

        By default every rank computes the whole penalty and divides it by the number of ranks; override this to divide the work. `W_dec`
        may be a DTensor, of which this rank holds only its own rows.
        """
        value = self(full(W_dec), critic, step)
        return value if parallelism.world.is_single else value / parallelism.world.world_size


class Penalties(nn.ModuleDict):
    """A dictionary of penalties; each key is the penalty's name in the logs."""

    def named(self) -> list[tuple[str, Penalty]]:
        """Pairs of name and penalty."""
        return list(self.items())  # pyright: ignore[reportReturnType]

    def constants(self, step: int, *, critic_is_trained: bool) -> tuple[float, ...] | None:
        """The Python values that the penalties of a step depend on; None where one of them depends on the step's number itself."""
        if any(penalty.uses_step for _, penalty in self.named()):
            return None
        return (critic_is_trained, *(penalty.weight * warm_up(step, penalty.warm_up_steps) for _, penalty in self.named()))

    def loss(self, W_dec: Tensor, critic: Critic | None, step: int, parallelism: Parallelism) -> tuple[Tensor | None, dict[str, Tensor]]:
        """This rank's share of the weighted penalty loss, and the value of each penalty whose weight is not 0 at this step.

        The loss is None where no such penalty has a gradient. Values are those over all ranks, not multiplied by weights. In the loss,
        weights are multiplied by `d_in`: the papers' squared error is a mean over `d_in`, SAELens's is a sum.
        """
        total: Tensor | None = None
        values: dict[str, Tensor] = {}
        for name, penalty in self.named():
            weight = W_dec.shape[1] * penalty.weight * warm_up(step, penalty.warm_up_steps)
            if weight == 0:
                continue
            value = penalty.rank_share(W_dec, critic, step, parallelism)
            values[name] = parallelism.world.sum_tensor(value)
            if value.requires_grad:  # `Orthogonality` with `every` > 1 is a constant 0 at most steps
                total = weight * value if total is None else total + weight * value
        return total, values

    def loss_and_values(
        self, W_dec: Tensor, critic: Critic | None, step: int, parallelism: Parallelism, *, critic_is_trained: bool
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The result of `loss`, with the value of every penalty as in `values_by_name`."""
        total, known = self.loss(W_dec, critic, step, parallelism)
        return total, self.values_by_name(W_dec, critic, step, parallelism, known, critic_is_trained=critic_is_trained)

    @torch.no_grad()
    def values_by_name(
        self,
        W_dec: Tensor,
        critic: Critic | None,
        step: int,
        parallelism: Parallelism,
        known: dict[str, Tensor],
        *,
        critic_is_trained: bool,
    ) -> dict[str, Tensor]:
        """The value of every penalty: the `known` ones, and all others computed here.

        Where `critic_is_trained` is false, penalties that need the critic and are not known are left out.
        """
        for name, penalty in self.named():
            if name not in known and (critic_is_trained or not penalty.needs_critic):
                known = {**known, name: parallelism.world.sum_tensor(penalty.rank_share(W_dec, critic, step, parallelism))}
        return known


class PenaltyLoss(ExtraLoss):
    """The penalty loss of a step. The checks of the critic's top-k are made with the step's own.

    Args:
        compute: Returns the loss, or None, and the penalties' values by name. It is called again if a check fails.
        constants: The Python values that `compute` depends on; None where it depends on the step's number.
        before_retry: Called before `compute` is called again.
        is_single: Whether one process trains. Several ranks check at once: a rank alone that computes again would wait for the others.
    """

    def __init__(
        self,
        compute: Callable[[], tuple[Tensor | None, dict[str, Tensor]]],
        *,
        constants: tuple[Any, ...] | None = None,
        before_retry: Callable[[], None] | None = None,
        is_single: bool = True,
    ) -> None:
        self._compute, self._constants, self._before_retry, self._is_single = compute, constants, before_retry, is_single
        self._checks, self._term = DeferredChecks(), ExtraTerm()

    @property
    def constants(self) -> tuple[Any, ...] | None:
        """The Python values that the loss depends on; None where it depends on the step's number."""
        return self._constants

    def start(self) -> None:
        """Compute the loss, with its checks deferred."""
        # Whoever defers checks already makes these as well.
        with deferred_checks() if self._is_single and not is_deferring() else nullcontext(DeferredChecks()) as self._checks:
            self._term = ExtraTerm(*self._compute())

    def finish(self) -> ExtraTerm:
        """The loss, after the checks."""
        if not self._checks.all_hold():
            if self._before_retry is not None:
                self._before_retry()
            self._term = ExtraTerm(*self._compute())
        term, self._term = self._term, ExtraTerm()  # not kept: its graph would live as long as a recording of this step
        return term


@final
class Decomposability(Penalty):
    """Mean decomposability of decoder rows by the critic, `mean_i exp(-||W_i/||W_i|| - What_i||^2 / sigma_sq)` (arXiv 2604.03436).

    With `rows` < 1 the mean is over that fraction of the rows, drawn anew at each step. This is cheaper and noisy. It is unbiased, except
    that a batch top-k critic sets its threshold from the drawn rows only.
    """

    needs_critic = True

    def __init__(self, weight: float, sigma_sq: float = 1.0, warm_up_steps: int = 0, rows: float = 1.0, seed: int = 0) -> None:
        super().__init__(weight, warm_up_steps)
        if sigma_sq <= 0:
            raise InputError(f"Decomposability: sigma_sq must be positive, got {sigma_sq}")
        if not 0 < rows <= 1:
            raise InputError(f"Decomposability: rows is the fraction of decoder rows that a step uses, above 0 and up to 1, got {rows}")
        self.sigma_sq, self.rows, self.seed = sigma_sq, rows, seed
        self.uses_step = rows < 1

    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """Mean decomposability of all rows, or of the rows drawn for this step."""
        return self.rank_share(W_dec, critic, step, Parallelism())

    def rank_share(
        self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, parallelism: Parallelism
    ) -> Float[Tensor, ""]:
        """This rank's share of the penalty; the shares of all ranks add up to its mean over the rows of the step."""
        assert critic is not None
        drawn, count, decoder = None, len(W_dec), local(W_dec)
        if self.rows < 1:
            count = max(1, round(self.rows * len(W_dec)))
            drawn = step_permutation(len(W_dec), step=step, seed=self.seed)[:count]
        indices = local_rows(W_dec, drawn, parallelism)
        with torch.no_grad():
            rows = decoder if indices is None else decoder.index_select(0, indices)
            reconstruction = critic(write_unit_rows(rows, buffer_or_new(SHARED, "unit", rows.shape, rows)))
        formula = functional.decomposability_with_slope if is_blocked(decoder) else passes_for(decoder).decomposability

        def value_and_slope(chunk: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
            return formula(chunk, rebuilt.to(chunk.dtype), self.sigma_sq)

        mean = mean_over_rows(value_and_slope, decoder, reconstruction, indices)
        return mean if parallelism.world.is_single else mean * (len(reconstruction) / count)


@final
class Orthogonality(Penalty):
    """Mean squared cosine between each row and its nearest neighbour in a random chunk of rows (arXiv 2509.22033).

    Chunks are drawn anew at each step. With `every` > 1 the penalty acts at every `every`-th step only, `every` times as strongly.
    """

    def __init__(self, weight: float = 0.25, chunk_size: int = 8192, every: int = 1, seed: int = 0, warm_up_steps: int = 0) -> None:
        super().__init__(weight, warm_up_steps)
        if chunk_size < 2 or every < 1:
            raise InputError(f"Orthogonality: chunk_size must be at least 2 and every at least 1, got {chunk_size} and {every}")
        self.chunk_size, self.every, self.seed = chunk_size, every, seed

    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """The mean squared cosine of each row to its nearest neighbour in its chunk, times `every`; 0 at the steps between.

        The chunks are drawn anew at each step.
        """
        return self.rank_share(W_dec, critic, step, Parallelism())

    def rank_share(
        self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, parallelism: Parallelism
    ) -> Float[Tensor, ""]:
        """This rank's share of the penalty; the shares of all ranks add up to `forward`.

        It is the sum of squared cosines over this rank's slice of every chunk, times `every`, divided by the number of all rows. Neighbours
        are searched in the whole chunk.
        """
        if step % self.every:
            return local(W_dec).new_zeros(())
        W_dec = full(W_dec)
        permuted = copy_to(step_permutation(len(W_dec), step=step, seed=self.seed), W_dec.device)
        if not is_blocked(W_dec):
            chunk_size = -(-len(permuted) // -(-len(permuted) // self.chunk_size))
            total = sum_of_squared_cosines(functional.unit_rows(W_dec), permuted, chunk_size, parallelism.world)
            return total * (self.every / len(W_dec))
        chunks = list(permuted.chunk(-(-len(permuted) // self.chunk_size)))
        shares = [parallelism.world.even_slice(len(chunk)) for chunk in chunks]
        return self.every * functional.orthogonality(W_dec, chunks, shares).sum() / len(W_dec)

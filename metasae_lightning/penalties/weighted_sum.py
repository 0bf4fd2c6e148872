"""The weighted sum of all penalties of a run, as a loss that is added to the primary's."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from metasae_lightning.compute.gpu.host_reads import DeferredChecks, deferred_checks, is_deferring
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.penalties.base import Critic, Penalty
from metasae_lightning.schedules import warm_up
from metasae_lightning.step import ExtraLoss, ExtraTerm


class Penalties(nn.ModuleDict):
    """A dictionary of penalties; each key is the penalty's name in the logs.

    `group_size` is the number of neighbouring rows that the primary gates as one.
    """

    def __init__(self, penalties: Mapping[str, Penalty], *, group_size: int = 1) -> None:
        super().__init__(penalties)
        for penalty in penalties.values():
            penalty.group_size = group_size

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

"""The result of one training forward pass, and how results of several micro-batches or several ranks are put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.step import Codes, ExtraTerm, ReconstructionLoss, StepStats

SQUARED_ERROR = "mse_loss"
"""SAELens's name of the squared error among the terms of a loss."""
HEAD_LOSS = "head_loss"
"""The name of a head's loss among the terms of a loss."""


@dataclass(frozen=True)
class ForwardResult:
    """One training forward pass. Its reconstruction is in normalised space if `ForwardPass` made it, in raw space if `Learner` did."""

    loss: Tensor
    """The architecture's training loss; with its graph before the backward pass."""
    losses: Mapping[str, Tensor]
    """The terms of the loss, by SAELens's names."""
    codes: Codes
    """The latents' activations."""
    rebuild: Callable[[], Tensor]
    """Computes `reconstruction` (below) on first access."""
    differentiable: Callable[[], Tensor] | None = None
    """Computes the reconstruction with its graph; None where the forward pass cannot, and in results without a graph."""
    latent_codes: Callable[[], Codes] | None = None
    """Computes the activations of latents with their graph, also where the units of `codes` have several latents; None as above."""
    rebuild_with_head: Callable[[], Tensor] | None = None
    """Computes the reconstruction together with a head's output, detached; None without a head."""
    error_weights: Float[Tensor, "row 1"] | None = None
    """The weight of each row's squared error in the loss; None is 1."""
    replaced_by_objective: tuple[str, ...] = (SQUARED_ERROR,)
    """The names of the terms of the loss that an objective takes the place of."""
    applied: bool = True
    """Whether the optimiser step was applied; false where it was skipped because of a NaN or infinity."""
    extra: ExtraTerm = field(default_factory=ExtraTerm)
    """The loss that was added to that of the rows."""

    @cached_property
    def reconstruction(self) -> Float[Tensor, "row d_in"]:
        """The reconstructed rows, detached; computed on first access."""
        return self.rebuild()

    def with_objective(self, objective: ReconstructionLoss, restore: Callable[[Tensor], Tensor]) -> "ForwardResult":
        """The result with a loss of the reconstruction in raw space, which `restore` gives, in place of the squared error.

        The other terms of the architecture's loss stay. The squared error stays among `losses`, to be logged.
        """
        assert self.differentiable is not None
        loss, terms = objective(restore(self.differentiable()))
        others = (value for name, value in self.losses.items() if name not in self.replaced_by_objective)
        return replace(self, loss=sum(others, start=loss), losses={**self.losses, **terms})

    def in_raw_space(self, restore: Callable[[Tensor], Tensor]) -> "ForwardResult":
        """The result with its reconstructions in raw space, which `restore` gives, and no graph but that of the loss."""
        loss, losses = self.loss, {name: value.detach() for name, value in self.losses.items()}
        if not self.codes.shape[0]:  # the mean over no rows is NaN; its weight in the step's loss is 0
            loss, losses = loss.nan_to_num(), {name: value.nan_to_num() for name, value in losses.items()}
        rebuild, with_head = self.rebuild, self.rebuild_with_head  # without this result, which holds the graph
        restored = None if with_head is None else lambda: restore(with_head())
        return ForwardResult(loss, losses, self.codes, lambda: restore(rebuild()), rebuild_with_head=restored)

    def select_rows(self, rows: slice, codes: Codes) -> "ForwardResult":
        """The result for a slice of the rows, given the codes of all of them in all latents; the loss stays that of all rows."""
        return replace(self, codes=codes.slice_rows(rows), rebuild=lambda: self.reconstruction[rows])

    def head_fvu(self, x: Float[Tensor, "row d_in"]) -> Callable[[], Float[Tensor, ""]] | None:
        """Computes the FVU of the reconstruction together with the head's output; None without a head."""
        with_head = self.rebuild_with_head
        return None if with_head is None else lambda: functional.fvu(x, with_head())


def gather_codes(codes: Codes, shard_offset: int, d_sae: int, ranks: ProcessGroup) -> Codes:
    """The codes of all latents, from each rank's codes of its own shard of latents, which starts at `shard_offset`."""
    if ranks.is_single:
        return codes
    # float64 represents every row and latent index exactly.
    gathered = ranks.all_gather_rows(torch.stack([codes.rows.double(), (codes.latents + shard_offset).double(), codes.values.double()], 1))
    rows, latents, values = gathered[(gathered[:, 0] * d_sae + gathered[:, 1]).argsort()].unbind(1)
    return Codes(rows.long(), latents.long(), values.to(codes.values.dtype), (codes.shape[0], d_sae))


def concatenate_results(results: list[ForwardResult]) -> ForwardResult:
    """The results of consecutive micro-batches as that of the batch. Losses are means weighted by rows, without graph if several."""
    if len(results) == 1:
        return results[0]
    rows = sum(result.codes.shape[0] for result in results)
    weights = [result.codes.shape[0] / max(rows, 1) for result in results]
    losses = {
        name: sum((result.losses[name] * weight for result, weight in zip(results, weights, strict=True)), torch.zeros(()))
        for name in results[0].losses
    }
    loss = sum((result.loss.detach() * weight for result, weight in zip(results, weights, strict=True)), torch.zeros(()))
    codes = Codes.concatenate([result.codes for result in results])
    with_head = [result.rebuild_with_head for result in results if result.rebuild_with_head is not None]
    return ForwardResult(
        *(loss, losses, codes, lambda: torch.cat([result.reconstruction for result in results])),
        rebuild_with_head=(lambda: torch.cat([rebuild() for rebuild in with_head])) if with_head else None,
    )


def step_stats(
    x: Float[Tensor, "row d_in"], result: ForwardResult, *, compute_dead: Callable[[], Tensor], ranks: ProcessGroup
) -> StepStats:
    """Loss, FVU and L0 of a step over the rows of all ranks; `x` and `result` are this rank's, `compute_dead` gives the dead latents.

    In a single process the FVU is computed on first access; ranks compute it together, at once.
    """
    if ranks.is_single:
        loss, codes = result.loss.detach(), result.codes
        return StepStats(loss, result.losses, codes.l0, lambda: functional.fvu(x, result.reconstruction), compute_dead, result.head_fvu(x))
    n, total, squares, error = functional.reconstruction_sums(x, result.reconstruction)
    with_head = error if result.rebuild_with_head is None else functional.reconstruction_sums(x, result.rebuild_with_head())[-1]
    means = torch.stack([result.loss.detach(), *result.losses.values(), x.new_full((), result.codes.l0)]).double() * n
    sums = torch.cat([torch.stack([n, squares, error, with_head]), means, total])
    ranks.all_reduce_sum_(sums)
    (n, squares, error, with_head), means, total = sums.split([4, len(means), len(total)])
    loss, *losses, l0 = (means / n).to(x.dtype)
    fvu, head_fvu = (functional.fvu_of_sums((n, total, squares, each)).to(x.dtype) for each in (error, with_head))
    compute_head_fvu = None if result.rebuild_with_head is None else lambda: head_fvu
    return StepStats(loss, dict(zip(result.losses, losses, strict=True)), l0, lambda: fvu, compute_dead, compute_head_fvu)


def micro_batches(x: Tensor, count: int, objective: ReconstructionLoss | None) -> list[tuple[Tensor, ReconstructionLoss | None]]:
    """`count` parts of the rows, each with the objective of its rows: parts of about equal size, or of whole contexts."""
    if objective is None:
        return [(rows, None) for rows in x.tensor_split(count)]
    return [(x[rows], part) for rows, part in objective.split(count)]

"""Frozen types that all packages share: the batch that a step receives and the results that it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Contexts:
    """The contexts that the rows of a batch are tokens of. They stay on the CPU."""

    tokens: Int[Tensor, "context position"]
    """All tokens of the contexts, also those that have no row, such as BOS."""
    positions: Int[Tensor, " row"]
    """The index of each row's token among all tokens of the contexts, in increasing order."""
    visible: Bool[Tensor, "context position position"] | None = None
    """The attention mask: which tokens each token may attend to. None is causal attention."""

    def split(self, count: int) -> "list[tuple[slice, Contexts]]":
        """`count` parts of whole consecutive contexts, of about the same number, each with the slice of its rows.

        >>> contexts = Contexts(torch.zeros(3, 4, dtype=torch.long), torch.tensor([1, 3, 5, 9, 11]))
        >>> [(rows.start, rows.stop, part.positions.tolist()) for rows, part in contexts.split(2)]
        [(0, 3, [1, 3, 5]), (3, 5, [1, 3])]
        """
        parts: list[tuple[slice, Contexts]] = []
        n_contexts = row = 0
        for tokens in self.tokens.tensor_split(count):
            begin, end = (n * self.tokens.shape[1] for n in (n_contexts, n_contexts + len(tokens)))
            rows = slice(row, int((self.positions < end).sum()))
            visible = None if self.visible is None else self.visible[n_contexts : n_contexts + len(tokens)]
            parts.append((rows, Contexts(tokens, self.positions[rows] - begin, visible)))
            n_contexts, row = n_contexts + len(tokens), rows.stop
        return parts


@dataclass(frozen=True)
class Batch:
    """Activations of one training or evaluation step, one row per token."""

    activations: Float[Tensor, "batch d_in"]
    widths: Mapping[str, int] = field(default_factory=dict)
    """Width of each hook's columns, in their order, where several hooks lie side by side. Empty where the data name no hook."""
    features: "Codes | None" = None
    """Activations of the true features: for held-out synthetic data only."""
    contexts: Contexts | None = None
    """The contexts of the rows, where the data give whole contexts."""

    @classmethod
    def of(cls, activations: "Batch | Tensor") -> "Batch":
        """A `Batch` from a batch or from a plain tensor of activations."""
        return activations if isinstance(activations, Batch) else cls(activations)

    def __len__(self) -> int:
        return self.activations.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> "Batch":
        """A copy on another device. Lightning calls this to move a batch."""
        activations = self.activations.to(*args, **kwargs)
        return replace(self, activations=activations, features=self.features and self.features.to(activations.device))

    def select_hook(self, hook: str | None) -> "Batch":
        """The batch with one hook's columns only; the whole batch where `hook` is None or the batch has only one hook.

        >>> Batch(torch.tensor([[1.0, 2.0, 3.0]]), {"a": 1, "b": 2}).select_hook("b").activations.tolist()
        [[2.0, 3.0]]
        """
        if hook is None or len(self.widths) < 2:
            return self
        names = list(self.widths)
        begin = sum(self.widths[name] for name in names[: names.index(hook)])
        columns = self.activations[:, begin : begin + self.widths[hook]]
        # On a GPU a product of whole rows may have other last bits than one of columns in wider rows, and a CUDA graph reads a copy.
        return replace(self, activations=columns.contiguous() if columns.is_cuda else columns, widths={})


@dataclass(frozen=True)
class Codes:
    """The nonzero latent activations of a batch, ordered by row: a tokens x latents matrix that is never dense.

    >>> codes = Codes.from_dense(torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 1.0]]))
    >>> codes.latents.tolist(), codes.values.tolist(), codes.firings().tolist(), codes.l0
    ([1, 0, 2], [2.0, 3.0, 1.0], [1, 1, 1], 1.5)
    """

    rows: Int[Tensor, " nnz"]
    """The token of each nonzero."""
    latents: Int[Tensor, " nnz"]
    """The latent of each nonzero."""
    values: Float[Tensor, " nnz"]
    """The activation of each nonzero."""
    shape: tuple[int, int]
    """Tokens, latents."""

    @classmethod
    def from_dense(cls, feature_acts: Tensor, *, with_graph: bool = False) -> "Codes":
        """The codes in a dense or sparse COO matrix of activations, without gradient unless `with_graph`."""
        acts = feature_acts if with_graph else feature_acts.detach()
        if acts.is_sparse:
            acts = acts.coalesce()
            (rows, latents), values = acts.indices(), acts.values()
            keep = values != 0
            rows, latents, values = rows[keep], latents[keep], values[keep]
        else:
            rows, latents = acts.nonzero(as_tuple=True)
            values = acts[rows, latents]
        return cls(rows, latents, values, (acts.shape[0], acts.shape[1]))

    @classmethod
    def concatenate(cls, parts: "list[Codes]") -> "Codes":
        """Concatenate the codes of consecutive micro-batches into those of the whole batch."""
        if len(parts) == 1:
            return parts[0]
        offsets = torch.tensor([p.shape[0] for p in parts]).cumsum(0).tolist()
        rows = [p.rows + start for p, start in zip(parts, [0, *offsets[:-1]], strict=True)]
        latents = [p.latents for p in parts]
        values = [p.values for p in parts]
        return cls(torch.cat(rows), torch.cat(latents), torch.cat(values), (offsets[-1], parts[0].shape[1]))

    def to(self, device: torch.device | str) -> "Codes":
        """A copy on another device."""
        return Codes(self.rows.to(device), self.latents.to(device), self.values.to(device), self.shape)

    def slice_rows(self, rows: slice) -> "Codes":
        """The codes of consecutive tokens; `rows` must have a start and a stop.

        >>> codes = Codes.from_dense(torch.eye(3)).slice_rows(slice(1, 3))
        >>> codes.rows.tolist(), codes.latents.tolist(), codes.shape
        ([0, 1], [1, 2], (2, 3))
        """
        nonzeros = slice(*torch.searchsorted(self.rows, self.rows.new_tensor([rows.start, rows.stop])).tolist())
        return Codes(
            self.rows[nonzeros] - rows.start, self.latents[nonzeros], self.values[nonzeros], (rows.stop - rows.start, self.shape[1])
        )

    def firings(self) -> Int[Tensor, " d_sae"]:
        """Number of tokens that each latent fired on."""
        return _count(self.latents, self.shape[1])

    def lengths(self) -> Int[Tensor, " batch"]:
        """Number of latents that fired on each token.

        >>> Codes.from_dense(torch.tensor([[0.0, 2.0, 5.0], [0.0, 0.0, 0.0]])).lengths().tolist()
        [2, 0]
        """
        return _count(self.rows, self.shape[0])

    @property
    def l0(self) -> float:
        """Mean number of active latents per token."""
        return self.values.numel() / max(self.shape[0], 1)


def _count(indices: Int[Tensor, " nnz"], size: int) -> Int[Tensor, " size"]:
    """How often each index below `size` occurs. `torch.bincount` would wait for a GPU, to find the largest index."""
    return indices.new_zeros(size).scatter_add_(0, indices, torch.ones_like(indices))


class ExtraTerm(NamedTuple):
    """A loss that is added to that of a step's rows, without its graph."""

    loss: Float[Tensor, ""] | None = None
    """The loss; None where it has no gradient."""
    values: Mapping[str, Tensor] = MappingProxyType({})
    """Figures to log, by name."""


@runtime_checkable
class ExtraLoss(Protocol):
    """Computes a loss that is added to that of a step's rows."""

    @property
    def constants(self) -> tuple[Any, ...] | None:
        """The Python values that the loss depends on, beside tensors; None where it depends on the step's number."""

    def start(self) -> None:
        """Compute the loss. The host's next read tells whether it is right."""

    def finish(self) -> ExtraTerm:
        """The loss with its graph, after the checks."""
        ...


@runtime_checkable
class ReconstructionLoss(Protocol):
    """A loss of the reconstruction of a batch's rows, which takes the place of the squared error."""

    def __call__(self, reconstruction: Float[Tensor, "row d_in"]) -> tuple[Float[Tensor, ""], Mapping[str, Tensor]]:
        """The loss with its gradient, as a mean over the rows, and its terms by name."""
        ...

    def split(self, count: int) -> "list[tuple[slice, ReconstructionLoss]]":
        """`count` parts of consecutive rows, each with the loss of its rows."""
        ...


@dataclass(frozen=True)
class StepStats:
    """Statistics of one SAE's forward pass on one batch."""

    loss: Float[Tensor, ""]
    """The architecture's own training loss, in its normalised space."""
    losses: Mapping[str, Tensor]
    """The terms of the loss by SAELens's names."""
    l0: float | Tensor
    """Mean number of active latents per row."""
    compute_fvu: Callable[[], Tensor]
    """Computes `fvu` (below) on first access."""
    compute_dead: Callable[[], Tensor]
    """Computes the mask of the latents that have not fired for longer than the dead window."""

    compute_head_fvu: Callable[[], Tensor] | None = None
    """Computes `head_fvu` (below) on first access; None for an SAE without a head."""

    @cached_property
    def fvu(self) -> Float[Tensor, ""]:
        """Fraction of variance unexplained on this batch, in raw space; computed on first access."""
        return self.compute_fvu()

    @cached_property
    def head_fvu(self) -> Float[Tensor, ""] | None:
        """The FVU of the reconstruction together with the head's output; None without a head."""
        return None if self.compute_head_fvu is None else self.compute_head_fvu()

    @cached_property
    def dead(self) -> Float[Tensor, ""]:
        """Fraction of latents that have not fired for longer than the dead window, at the first access."""
        return self.compute_dead().float().mean()


@dataclass(frozen=True)
class StepOutput:
    """Result of a training step, which callbacks read."""

    loss: Float[Tensor, ""]
    """The loss that was minimised: the primary's loss plus the weighted penalties."""
    primary: StepStats
    """Statistics of the primary SAE."""
    codes: Codes
    """Latent activations of the primary SAE."""
    rebuild: Callable[[], Tensor]
    """Computes `reconstruction` (below) on first access."""
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    """Value of each penalty, not multiplied by its weight."""
    meta: StepStats | None = None
    """Statistics of the last meta step, where this step ended a macro-step."""
    skipped: int = 0
    """Number of consecutive steps of one SAE, up to its latest, that were skipped because a tensor was not finite."""
    bad_tensor: str | None = None
    """Name of the tensor that was not finite in the latest skipped step."""

    @cached_property
    def reconstruction(self) -> Float[Tensor, "batch d_in"]:
        """Reconstruction of the batch by the primary SAE, in raw space; computed on first access."""
        return self.rebuild()

    def scalars(self) -> dict[str, Any]:
        """The total loss, both SAEs' statistics and loss terms, and the penalties, by their names in the logs."""
        values: dict[str, Any] = {"train/loss": self.loss}
        for role, stats in (("train", self.primary), ("meta", self.meta)):
            if stats is not None:
                values |= {f"{role}/fvu": stats.fvu, f"{role}/l0": stats.l0, f"{role}/dead": stats.dead}
                values |= {f"{role}/{name}": value for name, value in stats.losses.items()}
        if self.primary.head_fvu is not None:
            values["head/fvu"] = self.primary.head_fvu
        return values | {f"penalty/{name}": value for name, value in self.penalties.items()}


@dataclass(frozen=True)
class Evaluation:
    """Result of a validation or test step for the callbacks."""

    activations: Float[Tensor, "batch d_in"]
    """Activations of the batch."""
    codes: Codes
    """Latent activations of the primary SAE."""
    reconstruction: Float[Tensor, "batch d_in"]
    """Reconstruction of the batch by the primary SAE, in raw space."""

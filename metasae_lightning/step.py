"""The frozen types that every room speaks: what a step receives and what it returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Activations of one training step, one row a token."""

    activations: Float[Tensor, "batch d_in"]
    widths: Mapping[str, int] = field(default_factory=dict)
    """The hooks that lie side by side in the columns, and how wide each is; nothing where there is one, or none has a name."""
    features: "Codes | None" = None
    """The true features' activations, where the data are planted and held out."""

    @classmethod
    def of(cls, activations: "Batch | Tensor") -> "Batch":
        """A batch of whatever a source yields: a plain tensor will do."""
        return activations if isinstance(activations, Batch) else cls(activations)

    def __len__(self) -> int:
        return self.activations.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> "Batch":
        """Lightning moves a batch by this method."""
        activations = self.activations.to(*args, **kwargs)
        return replace(self, activations=activations, features=self.features and self.features.to(activations.device))

    def select_hook(self, hook: str | None) -> "Batch":
        """The columns of one hook; all of them where none is named.

        >>> Batch(torch.tensor([[1.0, 2.0, 3.0]]), {"a": 1, "b": 2}).select_hook("b").activations.tolist()
        [[2.0, 3.0]]
        """
        if hook is None or len(self.widths) < 2:
            return self
        names = list(self.widths)
        begin = sum(self.widths[name] for name in names[: names.index(hook)])
        return Batch(self.activations[:, begin : begin + self.widths[hook]], features=self.features)


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
    def from_dense(cls, feature_acts: Tensor) -> "Codes":
        """From a dense or sparse COO matrix of activations."""
        acts = feature_acts.detach()
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
        """Codes of consecutive micro-batches as those of the whole batch."""
        if len(parts) == 1:
            return parts[0]
        offsets = torch.tensor([p.shape[0] for p in parts]).cumsum(0).tolist()
        rows = [p.rows + start for p, start in zip(parts, [0, *offsets[:-1]], strict=True)]
        latents = [p.latents for p in parts]
        values = [p.values for p in parts]
        return cls(torch.cat(rows), torch.cat(latents), torch.cat(values), (offsets[-1], parts[0].shape[1]))

    def to(self, device: torch.device | str) -> "Codes":
        """The same on another device."""
        return Codes(self.rows.to(device), self.latents.to(device), self.values.to(device), self.shape)

    def slice_rows(self, rows: slice) -> "Codes":
        """The codes of consecutive tokens.

        >>> codes = Codes.from_dense(torch.eye(3)).slice_rows(slice(1, 3))
        >>> codes.rows.tolist(), codes.latents.tolist(), codes.shape
        ([0, 1], [1, 2], (2, 3))
        """
        at = slice(*torch.searchsorted(self.rows, self.rows.new_tensor([rows.start, rows.stop])).tolist())
        return Codes(self.rows[at] - rows.start, self.latents[at], self.values[at], (rows.stop - rows.start, self.shape[1]))

    def firings(self) -> Int[Tensor, " d_sae"]:
        """How many tokens each latent fired on."""
        return torch.bincount(self.latents, minlength=self.shape[1])

    @property
    def l0(self) -> float:
        """Mean number of active latents a token."""
        return self.values.numel() / max(self.shape[0], 1)


@dataclass(frozen=True)
class StepStats:
    """What one SAE's forward pass on one batch showed."""

    loss: Float[Tensor, ""]
    """The architecture's own training loss, in its normalised space."""
    losses: Mapping[str, Tensor]
    """Its parts by SAELens's names."""
    fvu: Float[Tensor, ""]
    """Fraction of variance unexplained on this batch, in raw space."""
    l0: float
    """Mean number of active latents a row."""
    dead: float
    """Share of latents silent for longer than the dead window."""


@dataclass(frozen=True)
class StepOutput:
    """What `training_step` hands to the callbacks, and the only thing they see of a step."""

    loss: Float[Tensor, ""]
    """Everything that was minimised: the primary's loss plus the weighted penalties."""
    primary: StepStats
    """The primary SAE on this batch."""
    codes: Codes
    """Its latent activations."""
    reconstruction: Float[Tensor, "batch d_in"]
    """Its reconstruction of the batch, in raw space."""
    penalties: Mapping[str, Tensor] = field(default_factory=dict)
    """Each penalty's value, before its weight."""
    meta: StepStats | None = None
    """The meta SAE's last step, where this step ended a macro-step."""
    skipped: int = 0
    """How many steps of one SAE, in a row up to its last, were left out because something was not finite."""
    bad_tensor: str | None = None
    """What was not, in the last of them."""

    def scalars(self) -> dict[str, Any]:
        """Everything that is one number, by the names that it is logged under."""
        found: dict[str, Any] = {"train/loss": self.loss}
        for role, reading in (("train", self.primary), ("meta", self.meta)):
            if reading is not None:
                found |= {f"{role}/fvu": reading.fvu, f"{role}/l0": reading.l0, f"{role}/dead": reading.dead}
                found |= {f"{role}/{name}": value for name, value in reading.losses.items()}
        return found | {f"penalty/{name}": value for name, value in self.penalties.items()}


@dataclass(frozen=True)
class Evaluation:
    """What a validation or test step hands to the callbacks."""

    activations: Float[Tensor, "batch d_in"]
    """The batch."""
    codes: Codes
    """The primary's latent activations."""
    reconstruction: Float[Tensor, "batch d_in"]
    """Its reconstruction, in raw space."""

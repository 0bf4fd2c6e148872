"""A training SAE run forwards: by SAELens's own code, or for the top-k family by kernels that leave the zeros out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, final

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainCoefficientConfig, TrainStepInput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from torch import Tensor

from metasae_lightning import compute
from metasae_lightning.compute.process_group import Crew, Ranks
from metasae_lightning.compute.sharding import added, first, mine, own, shared
from metasae_lightning.errors import InputError
from metasae_lightning.sae.pretrained import AnySAE
from metasae_lightning.schedules import warm_up
from metasae_lightning.step import Codes

Kernels = Literal["sparse", "dense"]
BatchCut = Literal["global", "local"]
"""Whose activations a batch top-k SAE ranks together: every rank's, or each rank's own."""
# SAELens's own classes alone: what a class made from one of them does instead is not known here.
FAMILY = (TopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE)

# Where the latents are in what can be divided among ranks.
LATENTS = {"W_enc": 1, "b_enc": 0, "W_dec": 0}


@dataclass(frozen=True)
class Forward:
    """What a training forward pass gives, in the SAE's own space."""

    loss: Tensor
    """The architecture's loss."""
    losses: dict[str, Tensor]
    """Its parts by SAELens's names."""
    codes: Codes
    """The latents' activations."""
    rebuild: Callable[[], Tensor]
    """Gives what follows."""

    @cached_property
    def reconstruction(self) -> Float[Tensor, "row d_in"]:
        """The rows rebuilt, detached; made when it is first asked for."""
        return self.rebuild()


class Passes(ABC):
    """How one SAE is run."""

    def __init__(self, sae: AnySAE) -> None:
        self.sae: Any = sae
        self.held: tuple[Tensor, Tensor] | None = None
        """Rows and latents that `read` keeps `again`."""
        self.crew = Crew()
        """Through whose batches one cut is made, and who has other latents."""

    @abstractmethod
    def join(self, crew: Crew, cut: BatchCut) -> None:
        """Train beside other ranks, whose batches are parts of one."""

    @abstractmethod
    def divide(self) -> None:
        """Be told that each rank is to have its part of the latents."""

    @abstractmethod
    def train(self, z: Float[Tensor, "row d_in"], *, dead: Bool[Tensor, " d_sae"], step: int, alone: bool) -> Forward:
        """The loss on these rows; what the architecture counts moves. `alone`: no gradient from before is wanted any more."""

    @abstractmethod
    def read(self, z: Float[Tensor, "row d_in"], *, again: bool = False, lent: bool = False) -> tuple[Codes, Float[Tensor, "row d_in"]]:
        """Codes and reconstruction by the training rule; nothing moves. `again`: what is held is kept, nothing ranked. `lent`: the next
        reading may write over the reconstruction."""


def passes_of(sae: AnySAE, kernels: Kernels, *, recurring: int = 0) -> Passes:
    """The kernels that were asked for, where the architecture has them; `recurring` rows are those of the last batch, moved a little."""
    return Sparse(sae, compute.Screen(recurring) if recurring else None) if kernels == "sparse" and type(sae) in FAMILY else Dense(sae)


@final
class Dense(Passes):
    """SAELens's own forward pass."""

    def join(self, crew: Crew, cut: BatchCut) -> None:
        """See the class; a cut through several ranks' batches is nothing that SAELens knows."""
        if isinstance(self.sae, BatchTopKTrainingSAE) and cut == "global" and not crew.all.alone:
            raise InputError(
                f"SAELens's own {type(self.sae).__name__} ranks each process's batch apart: set kernels: sparse where it is one of "
                f"{', '.join(kind.__name__ for kind in FAMILY)}, or batch_cut: local"
            )

    def divide(self) -> None:
        """See the class; a part of the latents is nothing that SAELens knows, even where it is all of them."""
        raise InputError(
            f"latents are divided by the sparse kernels alone, got kernels: dense or a {type(self.sae).__name__}: set kernels: sparse, "
            f"and one of {', '.join(kind.__name__ for kind in FAMILY)}, or trainer.strategy: ddp"
        )

    def train(self, z: Tensor, *, dead: Tensor, step: int, alone: bool) -> Forward:
        """See the class; coefficients are warmed up as SAELens's trainer does."""
        coefficients: dict[str, float] = {}
        for name, given in self.sae.get_coefficients().items():
            value, steps = given if isinstance(given, TrainCoefficientConfig) else (given, 0)
            coefficients[name] = value * warm_up(step, steps)
        out = self.sae.training_forward_pass(
            TrainStepInput(sae_in=z, coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False)
        )
        return Forward(out.loss, out.losses, Codes.from_dense(out.feature_acts), lambda: out.sae_out.detach())

    def read(self, z: Tensor, *, again: bool = False, lent: bool = False) -> tuple[Codes, Tensor]:
        """See the class; SAELens's own code knows neither."""
        acts = self.sae.encode(z)
        return Codes.from_dense(acts), self.sae.decode(acts)


@final
class Sparse(Passes):
    """The same function for SAELens's top-k, batch top-k and matryoshka SAEs, and the same gradients.

    A decoder that is rescaled by its rows' norms has them in what is kept and nowhere else: what multiplies an activation divides it again
    before it is decoded.
    """

    def __init__(self, sae: AnySAE, screen: compute.Screen | None = None) -> None:
        super().__init__(sae)
        self.screen = screen
        self._near: float | None = None
        self._gradients = compute.Memory()
        # Rows that come again are many; a batch's may still be looked at when the next one is there.
        self._rows = compute.Memory() if screen is not None else None

    def join(self, crew: Crew, cut: BatchCut) -> None:
        """See the class."""
        self.crew = crew if cut == "global" else crew.within

    def divide(self) -> None:
        """It asks each time which latents there are."""

    def train(self, z: Tensor, *, dead: Tensor, step: int, alone: bool) -> Forward:
        """See the class."""
        W_dec, b_dec = own(self.sae.W_dec), own(self.sae.b_dec)
        z, silent = z.to(W_dec.dtype), dead.nonzero().flatten()
        apart = mine(silent, self.sae.W_dec, self.crew.latents)
        found = self._encode(z, apart, alone)
        memory, beside = self._gradients if alone else None, self.crew.latents
        if len(self._widths) == 1:
            error, off, rows = compute.squared_error(
                found.values, found.pattern, W_dec, b_dec, z, apart, memory, self._rows if alone else None, beside
            )
            losses, left = {"mse_loss": error}, [off.neg()] if len(silent) else []
        else:
            parts, rows = self._levels(found, apart, W_dec, b_dec, memory)
            losses, left = {"mse_loss": _error(parts[-1], z)}, list(z - parts.detach())
            off = parts[-1].detach() - z
            losses |= {f"inner_mse_loss_{width}": _error(part, z) for width, part in zip(self._widths[:-1], parts, strict=False)}
        losses["auxiliary_reconstruction_loss"] = self._auxiliary(left, apart, found.apart, rows) if len(silent) else z.new_zeros(())
        codes = self._codes(found)
        if hasattr(self.sae, "update_topk_threshold") and found.edge is not None:
            self.sae.update_topk_threshold(codes.values.new_tensor([found.edge]))
        return Forward(sum(losses.values(), z.new_zeros(())), losses, codes, lambda: z + off)

    @torch.no_grad()
    def read(self, z: Tensor, *, again: bool = False, lent: bool = False) -> tuple[Codes, Tensor]:
        """See the class."""
        z, held = z.to(self.sae.W_dec.dtype), self.held if again else None
        if held is not None and len(held[0]) and held[0][-1] >= len(z):
            held = None  # of other rows
        found = self._encode(z, None, alone=True) if held is None else self._held(z, *held)
        if again:
            self.held = found.pattern.rows, found.pattern.columns
        with torch.autocast(z.device.type, enabled=False):
            into = compute.LENT.take("rebuilt", z.shape, found.values) if lent else None
            rebuilt = found.pattern.product(found.values, own(self.sae.W_dec), into)
            self.crew.latents.sum_(rebuilt)
            return self._codes(found), rebuilt.add_(own(self.sae.b_dec))

    def _encode(self, z: Tensor, apart: Tensor | None, alone: bool) -> compute.Encoded:
        sae = self.sae
        each_row = not isinstance(sae, BatchTopKTrainingSAE)
        rule = compute.Rule(sae.cfg.k, each_row, self._near, self.screen, self.crew)
        origin = shared(own(sae.b_dec), self.crew.latents) if sae.cfg.apply_b_dec_to_input else None
        memory: dict[str, Any] = {"gradients": self._gradients, "rows": self._rows} if alone else {}
        found = compute.encode(z, own(sae.W_enc), own(sae.b_enc), rule, origin=origin, scale=self._norms, apart=apart, **memory)
        self._near = found.edge
        return found

    def _levels(
        self, found: compute.Encoded, apart: Tensor, W_dec: Tensor, b_dec: Tensor, memory: compute.Memory | None
    ) -> tuple[Tensor, Tensor]:
        """What the latents up to each width rebuild, the last all of them, and the decoder's rows apart."""
        pattern, order = _by_level(found.pattern, [width - self._first for width in self._widths])
        rebuilt, rows = compute.decode(found.values[order], pattern, W_dec, apart, memory)
        rebuilt = added(rebuilt, self.crew.latents)
        return rebuilt.view(len(self._widths), -1, rebuilt.shape[1]).cumsum(0) + b_dec, rows

    def _held(self, z: Tensor, rows: Tensor, columns: Tensor) -> compute.Encoded:
        sae, columns = self.sae, columns.to(z.device)
        pattern = compute.Pattern(rows.to(z.device), columns, (len(z), sae.cfg.d_sae))
        z = z - sae.b_dec if sae.cfg.apply_b_dec_to_input else z
        values = pattern.sampled(z, sae.W_enc.T.contiguous()) + sae.b_enc[columns]
        return compute.Encoded(values.relu(), pattern, z.new_empty(len(z), 0), None)

    @property
    def _norms(self) -> Tensor | None:
        return own(self.sae.W_dec).detach().norm(dim=-1) if self.sae.cfg.rescale_acts_by_decoder_norm else None

    @property
    def _first(self) -> int:
        """The first of this rank's latents."""
        return first(self.sae.W_dec, self.crew.latents)

    @property
    def _widths(self) -> list[int]:
        return getattr(self.sae.cfg, "matryoshka_widths", [self.sae.cfg.d_sae])

    def _codes(self, found: compute.Encoded) -> Codes:
        values, norms = found.values.detach(), self._norms
        scaled = values if norms is None else values * norms[found.pattern.columns]
        return Codes(found.pattern.rows, found.pattern.columns, scaled, found.pattern.shape)

    def _auxiliary(self, left: list[Tensor], apart: Tensor, acts: Tensor, rows: Tensor) -> Tensor:
        """What the dead make of what the living `left`, as SAELens has it; level by level where that is asked for."""
        widths = self._widths if getattr(self.sae.cfg, "use_matryoshka_aux_loss", False) else self._widths[-1:]
        borders = [0, *torch.searchsorted(apart, apart.new_tensor(widths) - self._first).tolist()]
        norms, wanted, total, beside = self._norms, rows.shape[1] // 2, rows.new_zeros(()), self.crew.latents
        for begin, end, error in zip(borders[:-1], borders[1:], left[-len(widths) :], strict=True):
            counts = beside.each(end - begin, rows)
            if not sum(counts):
                continue
            of_level = acts[:, begin:end]
            if sum(counts) > wanted:
                ranked = of_level.detach() if norms is None else of_level.detach() * norms[apart[begin:end]]
                of_level = of_level * _chosen(ranked, wanted, max(counts), beside)
            total = total + min(sum(counts) / wanted, 1.0) * _error(added(of_level @ rows[begin:end], beside), error)
        return self.sae.cfg.aux_loss_coefficient * total


def _chosen(ranked: Tensor, wanted: int, most: int, ranks: Ranks) -> Tensor:
    """Which of a row's are the `wanted` largest, on all ranks together, of which none has more than `most`."""
    own_columns = ranked.topk(min(wanted, ranked.shape[1]), sorted=False).indices
    short = min(wanted, most) - own_columns.shape[1]
    candidates = torch.nn.functional.pad(ranked.gather(1, own_columns), (0, short), value=-torch.inf)
    kept = compute.among(candidates, wanted, ranks)[:, : own_columns.shape[1]]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(1, own_columns, kept)


def _by_level(pattern: compute.Pattern, widths: list[int]) -> tuple[compute.Pattern, Tensor]:
    """The latents of each level as a batch of its own, one below the other, and the order that the nonzeros are in then."""
    level = torch.bucketize(pattern.columns, pattern.columns.new_tensor(widths), right=True)
    rows, order = (level * pattern.shape[0] + pattern.rows).sort(stable=True)
    return compute.Pattern(rows, pattern.columns[order], (len(widths) * pattern.shape[0], pattern.shape[1])), order


def _error(rebuilt: Tensor, z: Tensor) -> Tensor:
    return (rebuilt - z).square().sum(-1).mean()

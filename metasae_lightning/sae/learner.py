"""One SAE that learns: a SAELens training SAE with its normaliser, its decoder's constraint and its statistics.

The primary and the meta SAE are both learners; they differ in what rows they are fed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from sae_lens import TrainingSAEConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from metasae_lightning import functional
from metasae_lightning.compute.process_group import Crew
from metasae_lightning.compute.row_chunks import pieces
from metasae_lightning.compute.sharding import divide, divided, fill, first, gathered, own
from metasae_lightning.errors import InputError
from metasae_lightning.sae import conversion, forward, pretrained
from metasae_lightning.sae.conversion import Adopted, Origin
from metasae_lightning.sae.forward_result import Pass, merged, of_all_latents
from metasae_lightning.sae.nonfinite import Guard
from metasae_lightning.sae.normalizers import normalizer_of
from metasae_lightning.step import Codes, Reading

Backward = Callable[[Tensor], None]


class Learner(nn.Module):
    """A SAELens training SAE and everything about it that training moves."""

    silent_for: Tensor
    """Rows seen by all ranks since each latent last fired: tokens for a primary, decoder rows for a meta SAE."""
    steps: Tensor
    """Optimiser steps taken."""
    updates: Tensor
    """Training forward passes that moved the architecture's running statistics."""
    rows_seen: Tensor
    """Rows trained on, over all ranks."""
    initialized: Tensor
    """Whether the statistics that come from data are there."""
    measured_k: Tensor
    """The k that an SAE to start from had, where that is asked for; 0 before."""

    def __init__(
        self,
        cfg: TrainingSAEConfig,
        *,
        role: str,
        seed: int,
        decoder_rows: Literal["unit", "free"],
        b_dec_init: Literal["zeros", "mean", "geometric_median"],
        dead_after: int,
        micro_batches: int = 1,
        clip_grad_norm: float | None = None,
        origin: Origin | None = None,
        kernels: forward.Kernels = "sparse",
        recurring: int = 0,
    ) -> None:
        super().__init__()
        self.role, self.origin = role, origin
        self.sae = pretrained.build(cfg, role=role, seed=seed)
        self._passes = forward.passes_of(self.sae, kernels, recurring=recurring)
        self.crew = Crew()
        self.guard: Guard | None = None
        self.normalizer = normalizer_of(cfg.normalize_activations, cfg.d_in)
        self.decoder_rows, self.b_dec_init, self.dead_after = decoder_rows, b_dec_init, dead_after
        self.micro_batches, self.clip_grad_norm = micro_batches, clip_grad_norm
        self.register_buffer("silent_for", torch.zeros(cfg.d_sae, dtype=torch.int64))
        for name in ("steps", "updates", "rows_seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool))
        if origin is not None and origin.measured_k:
            self.register_buffer("measured_k", torch.zeros((), dtype=torch.float64))
            self.register_load_state_dict_post_hook(_take_k)
        self._renormalize()

    def join(self, crew: Crew, cut: forward.BatchCut) -> None:
        """Learn beside other ranks: each has some of a step's rows, or of the latents, and all make the same step."""
        self.crew = crew
        self._passes.join(crew, cut)

    def divide(self, mesh: Any) -> None:
        """Have each rank of a mesh keep its part of the latents, and of everything that an optimiser keeps of them."""
        if isinstance(self.W_dec, DTensor):
            return
        self._passes.divide()
        if self.sae.cfg.d_sae % mesh.size():
            raise InputError(f"{self.role}.d_sae must be a multiple of the {mesh.size()} ranks that divide it, got {self.sae.cfg.d_sae}")
        divide(self.sae, mesh, forward.LATENTS)

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The SAE's state, whole, where it is to be kept; every rank takes part."""
        return gathered(self.sae.state_dict(), keep=keep)

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder, one row a latent."""
        return self.sae.W_dec

    @property
    def dead(self) -> Tensor:
        """Which latents have been silent for longer than the window."""
        return self.silent_for >= self.dead_after

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "rows d_in"]) -> Adopted | None:
        """Take from the first rows what comes from data: the normaliser's statistics, the decoder bias or another SAE's weights. Once."""
        if self.initialized or (self.guard is not None and not x.isfinite().all()):
            return None
        # The first batch is a training step's, and what is made of it stays: in full precision, and every rank has all of it.
        crew, self._passes.crew = self._passes.crew, self.crew.within
        with torch.autocast(x.device.type, enabled=False):
            adopted = self._begin(x)
        self._passes.crew = crew
        self.initialized.fill_(True)
        return adopted

    def _begin(self, x: Tensor) -> Adopted | None:
        self.normalizer.fit(x)
        if self.origin is not None:
            return self._adopt(self.origin, x, self.normalizer.normalize(x)[0])
        if self.b_dec_init == "mean":
            fill(self.sae.b_dec, self.normalizer.normalize(x)[0].mean(0))
        elif self.b_dec_init == "geometric_median":
            fill(self.sae.b_dec, functional.geometric_median(self.normalizer.normalize(x)[0]))
        return None

    def _adopt(self, origin: Origin, x: Tensor, z: Tensor) -> Adopted:
        """The weights of the SAE to start from, measured before and after on these rows."""
        source = origin.open(self.role, self.sae.cfg)
        source.to(device=str(x.device), dtype=torch.float32)
        l0, fvu = pretrained.measure(source, x.float().split(1024))
        lost = conversion.adopt(source, self.sae, self.normalizer, z, unit_rows=self.decoder_rows == "unit")
        origin.close()
        if origin.measured_k:
            if l0 == 0:
                raise InputError(f"measured_k: no latent of {origin.place} is active on these {len(x):,} rows")
            self.measured_k.fill_(l0)
            _take_k(self)
        codes, rebuilt = self._read(x)
        kinds = source.cfg.architecture(), self.sae.cfg.architecture()
        return Adopted(origin.place, kinds, (l0, codes.l0), (fvu, functional.fvu(x, rebuilt).item()), len(x), lost)

    def learn(self, x: Float[Tensor, "rows d_in"], optimizer: Optimizer, *, backward: Backward, added: Tensor | None = None) -> Pass:
        """One optimiser step on these rows and those of other ranks, in micro-batches; `added`, a sum over ranks too, joins the loss once.

        Ranks that divide the latents give each other their rows, and each learns from all of them.

        The order is that of arXiv 2406.04093 but for renormalising last: gradient, its radial part removed, clip, step, unit rows. One
        that a guard refuses leaves everything as it was but for the rows that are counted.
        """
        optimizer.zero_grad()
        if self.guard is not None:
            self.guard.remember(self._moving())
        passes: list[Pass] = []
        count, some = int(self.crew.all.total(len(x), x)), self.crew.latents.place(len(x), x)
        x = self.crew.latents.together(x)
        # As many parts on every rank, for they talk to each other about each.
        for i, rows in enumerate(x.tensor_split(self.micro_batches)):
            # Not every optimiser's zero_grad lets go: a gradient that is still there lies in the memory that the next would be made in.
            passes.append(self._forward(rows, alone=i == 0 and self.W_dec.grad is None))
            backward(passes[-1].loss * (len(rows) / count))
        if added is not None:  # on its own: then its gradient is added to the loss's in place
            backward(added)
        if not self.crew.rows.alone:  # what this rank's rows say nothing of is summed all the same: others wait for it
            for parameter in self.sae.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad and parameter.grad is None else parameter.grad
        gradients = [parameter.grad for parameter in self.sae.parameters() if parameter.grad is not None]
        self.crew.rows.sum_(*(own(gradient) for gradient in gradients))
        # What ranks have alike stays so to the bit, in whatever order each has added up.
        self.crew.latents.first_(*(own(gradient) for gradient in gradients if not divided(gradient)))
        seen = merged(passes)
        if not self.crew.latents.alone:
            seen = seen.of(some, self._of_all(seen.codes))
        if self.guard is not None and self.guard.refuses(self._made(seen, added), self._moving(), self.crew.all):
            self.rows_seen += count
            return replace(seen, taken=False)
        self.held = None
        self._constrain_gradient()
        optimizer.step()
        self._renormalize()
        self._observe(seen.codes, count)
        return seen

    def _moving(self) -> dict[str, Tensor]:
        """What a forward pass moves."""
        return {"updates": self.updates, **dict(self.sae.named_buffers())}

    def _made(self, seen: Pass, added: Tensor | None) -> dict[str, Tensor]:
        """What a step is taken by, causes before what they lead to."""
        gradients = {name: parameter.grad for name, parameter in self.sae.named_parameters() if parameter.grad is not None}
        made = {f"the {self.role} SAE's loss": seen.loss, **({} if added is None else {"the penalties' sum": added})}
        return {**made, **{f"the gradient of {self.role}.sae.{name}": gradient for name, gradient in gradients.items()}}

    @property
    def held(self) -> tuple[Tensor, Tensor] | None:
        """Rows and latents that a critic keeps `again`, where it was asked to; none after it has learnt."""
        return self._passes.held

    @held.setter
    def held(self, places: tuple[Tensor, Tensor] | None) -> None:
        self._passes.held = places

    @torch.no_grad()
    def read(self, x: Float[Tensor, "rows d_in"], *, again: bool = False, lent: bool = False) -> tuple[Codes, Float[Tensor, "rows d_in"]]:
        """Codes and reconstruction by the training rule; no gradient, and nothing that training moves.

        With `again` the latents that are kept are those of the first time since the SAE last learnt, for these rows little has moved. With
        `lent` the next such reading may write over the reconstruction.
        """
        if self.crew.latents.alone:
            return self._read(x, again=again, lent=lent)
        some = self.crew.latents.place(len(x), x)
        codes, rebuilt = self._read(self.crew.latents.together(x))
        return codes.of(some), rebuilt[some]

    def reconstruct(self, x: Float[Tensor, "rows d_in"], *, again: bool = False, lent: bool = False) -> Float[Tensor, "rows d_in"]:
        """The reconstruction alone: the learner as a frozen critic."""
        return self.read(x, again=again, lent=lent)[1]

    def _read(self, x: Tensor, *, again: bool = False, lent: bool = False) -> tuple[Codes, Tensor]:
        """The same of rows that every rank that has other latents has too."""
        z, undo = self.normalizer.normalize(x)
        codes, rebuilt = self._passes.read(z, again=again, lent=lent)
        return self._of_all(codes), self.normalizer.restore(rebuilt, undo).to(x.dtype)

    def _of_all(self, codes: Codes) -> Codes:
        return of_all_latents(codes, first(self.W_dec, self.crew.latents), len(self.W_dec), self.crew.latents)

    def _forward(self, x: Tensor, *, alone: bool) -> Pass:
        z, undo = self.normalizer.normalize(x)
        out = self._passes.train(z, dead=self.dead, step=int(self.steps), alone=alone)
        if self.crew.all.total(out.codes.values.numel(), z):  # SAELens's threshold stays where it is when nothing fires
            self.updates += 1
        loss, losses = out.loss, {name: value.detach() for name, value in out.losses.items()}
        if not len(x):  # a mean over nothing, which counts for nothing
            loss, losses = loss.nan_to_num(), {name: value.nan_to_num() for name, value in losses.items()}
        return Pass(loss, losses, out.codes, len(x), lambda: self.normalizer.restore(out.reconstruction, undo))

    @torch.no_grad()
    def _constrain_gradient(self) -> None:
        gradient = self.W_dec.grad
        if self.decoder_rows == "unit" and gradient is not None:
            for some, rows in pieces(own(gradient), own(self.W_dec)):
                some.copy_(functional.without_radial(some, rows))
        if self.clip_grad_norm is not None:
            clip_grad_norm_(self.sae.parameters(), self.clip_grad_norm)

    @torch.no_grad()
    def _renormalize(self) -> None:
        if self.decoder_rows == "unit":
            for (rows,) in pieces(own(self.W_dec)):
                rows.copy_(functional.unit_rows(rows))
        # Outside Lightning an autocast around several steps would go on with the weights it cast for the first.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _observe(self, codes: Codes, rows: int) -> None:
        self.steps += 1
        self.rows_seen += rows
        fired = torch.zeros_like(self.silent_for, dtype=torch.uint8)
        fired[codes.latents] = 1
        self.crew.all.largest_(fired)
        self.silent_for.add_(rows).masked_fill_(fired.bool(), 0)
        if self._passes.crew.rows.alone and not self.crew.rows.alone:  # each has cut its own batch: the rule for inference is their mean
            thresholds = [buffer for buffer in self.sae.buffers() if buffer.is_floating_point()]
            self.crew.all.sum_(*thresholds)
            for threshold in thresholds:
                threshold /= self.crew.all.world_size

    def reading(self, x: Float[Tensor, "rows d_in"], seen: Pass) -> Reading:
        """What a step on these rows, and those of other ranks, showed."""
        dead = self.dead.float().mean().item()
        if self.crew.all.alone:
            return Reading(seen.loss.detach(), seen.losses, functional.fvu(x, seen.reconstruction), seen.codes.l0, dead)
        n, total, squares, error = functional.reconstruction_sums(x, seen.reconstruction)
        means = torch.stack([seen.loss.detach(), *seen.losses.values(), x.new_tensor(seen.codes.l0)]).double() * n
        sums = torch.cat([torch.stack([n, squares, error]), means, total])
        self.crew.all.sum_(sums)
        (n, squares, error), means, total = sums.split([3, len(means), len(total)])
        loss, *losses, l0 = (means / n).to(x.dtype)
        fvu = functional.fvu_of_sums((n, total, squares, error)).to(x.dtype)
        return Reading(loss, dict(zip(seen.losses, losses, strict=True)), fvu, l0.item(), dead)


def _take_k(learner: Learner, _: object = None) -> None:
    """Have an SAE rank by the k that was measured; a checkpoint's too."""
    if learner.measured_k > 0:
        pretrained.set_k(learner.sae, learner.measured_k.item())

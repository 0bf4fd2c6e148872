"""One SAE in training: a SAELens training SAE with its normaliser, its decoder constraint and its statistics.

The primary and the meta SAE are both learners. The primary reads activations, the meta SAE reads decoder rows.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import TrainingSAEConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from metasae_lightning import functional
from metasae_lightning.architectures import Units
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.row_passes import remove_radial, write_unit_rows
from metasae_lightning.compute.sharding import full_state_dict, local, shard_offset, shard_parameters
from metasae_lightning.errors import InputError
from metasae_lightning.sae import forward, pretrained
from metasae_lightning.sae.forward_pass import Keep
from metasae_lightning.sae.forward_result import ForwardResult, concatenate_results, gather_codes, micro_batches, step_stats
from metasae_lightning.sae.gpu_layout import store_encoder_for_device
from metasae_lightning.sae.gradients import clip_gradients, reduce_gradients
from metasae_lightning.sae.head_loss import add_head, build_head, forward_frozen, initialize_head
from metasae_lightning.sae.host_counters import HostCounters
from metasae_lightning.sae.init_from import InitFrom, InitReport
from metasae_lightning.sae.learner_config import LearnerConfig
from metasae_lightning.sae.nonfinite import NonFiniteGuard, step_tensors
from metasae_lightning.sae.normalizers import make_normalizer
from metasae_lightning.sae.running_threshold import average_buffers
from metasae_lightning.sae.step_graph import StepGradients, StepGraph
from metasae_lightning.step import Codes, ExtraLoss, ExtraTerm, ReconstructionLoss, StepStats

Backward = Callable[[Tensor], None]
"""Runs the backward pass of a loss."""


class Learner(HostCounters):
    """A SAELens training SAE with everything that changes while it trains."""

    COUNTERS = ("steps", "updates", "rows_seen", "initialized")

    silent_for: Tensor
    """Rows seen by all ranks since each unit last fired: tokens for a primary, decoder rows for a meta SAE."""
    steps: int = 0
    """Number of optimiser steps applied."""
    updates: int = 0
    """Number of training forward passes that updated the architecture's running statistics."""
    rows_seen: int = 0
    """Number of rows trained on, over all ranks."""
    initialized: bool = False
    """Whether `initialize` has run."""
    measured_k: Tensor
    """The L0 of the source SAE, which is this SAE's k, where `init_from` has `measured_k`; 0 before `initialize`."""

    def __init__(self, cfg: TrainingSAEConfig, config: LearnerConfig, *, role: str, seed: int, head: nn.Module | None = None) -> None:
        super().__init__()
        self.role, self.config, self.parallelism = role, config, Parallelism()
        self.is_frozen = head is not None and config.head_training == "frozen_sae"
        self.sae = pretrained.build(cfg, role=role, seed=seed)
        pretrained.check_decoder_rows(self.sae, config.decoder_rows)
        self.forward_pass = forward.forward_pass_for(self.sae, config.kernels, n_fixed_rows=config.n_fixed_rows)
        self.step_graph = StepGraph(self) if config.cuda_graph and config.micro_batches == 1 else None
        self.guard: NonFiniteGuard | None = None
        self.normalizer = make_normalizer(cfg.normalize_activations, cfg.d_in)
        self.register_buffer("silent_for", torch.zeros(Units.of(cfg).count, dtype=torch.int64, device=cfg.device))
        if config.init_from is not None and config.init_from.measured_k:
            self.register_buffer("measured_k", torch.zeros((), dtype=torch.float64))
            self.register_load_state_dict_post_hook(pretrained.apply_measured_k)
        self._renormalize()
        self.head = None if head is None else build_head(head, self.sae, seed=seed, freeze=self.is_frozen)
        store_encoder_for_device(self.sae)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Learner":
        """Move or convert the module, and store its encoder as the device wants it."""
        super()._apply(fn, recurse)
        store_encoder_for_device(self.sae)
        return self

    def join(self, parallelism: Parallelism, cut: forward.BatchCut) -> None:
        """Train together with other ranks: each has part of a step's rows or part of the latents, and all make the same step."""
        self.parallelism = parallelism
        self.forward_pass.join(parallelism, cut)
        if not parallelism.world.is_single:
            self.step_graph = None

    def add_critic(self, critic: "Learner") -> None:
        """Tell which other learner the extra loss of a step reads."""
        if self.step_graph is not None:
            self.step_graph.learners.append(critic)

    def divide(self, mesh: Any) -> None:
        """Shard the latents over the ranks of a mesh, before optimisers are made: their state is then sharded too."""
        if isinstance(self.W_dec, DTensor):
            return
        self.forward_pass.check_divisible()
        if self.sae.cfg.d_sae % mesh.size():
            raise InputError(f"{self.role}.d_sae must be a multiple of the {mesh.size()} ranks that divide it, got {self.sae.cfg.d_sae}")
        shard_parameters(self.sae, mesh, forward.LATENTS)

    def weights(self, *, keep: bool = True) -> dict[str, Tensor]:
        """The SAE's full state dict, on ranks with `keep`, otherwise an empty one; every rank must call this."""
        return full_state_dict(self.sae.state_dict(), keep=keep)

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder, one row per latent."""
        return self.sae.W_dec

    @property
    def dead(self) -> Tensor:
        """Mask of the dead latents: silent for `dead_after` rows or longer."""
        return self.silent_for >= self.config.dead_after

    @torch.no_grad()
    def initialize(self, x: Float[Tensor, "rows d_in"]) -> InitReport | None:
        """Fit the normaliser and set `b_dec` or `init_from`'s weights, once, on the first rows (with a guard: the first finite rows)."""
        if self.initialized or (self.guard is not None and not x.isfinite().all()):
            return None
        report: InitReport | None = None
        # Every rank has the same rows here, so nothing is reduced over data ranks. Full precision, since the results are kept for the run.
        parallelism, self.forward_pass.parallelism = self.forward_pass.parallelism, self.parallelism.tensor_only
        with torch.autocast(x.device.type, enabled=False):
            self.normalizer.fit(x)
            if self.config.init_from is not None:
                report = self._load_weights(self.config.init_from, x)
            elif self.config.b_dec_init != "zeros":
                pretrained.initialize_b_dec(self.sae, self.normalizer.normalize(x)[0], self.config.b_dec_init)
            if self.head is not None:
                initialize_head(self.head, self.forward_pass, self.normalizer.normalize(x)[0], self.dead)
        self.forward_pass.parallelism = parallelism
        self.initialized = True
        return report

    def _load_weights(self, init_from: InitFrom, x: Tensor) -> InitReport:
        """Convert the weights of the SAE to start from; the report compares both SAEs on the rows `x`."""
        source = init_from.load_into(self.sae, self.normalizer, x, role=self.role, unit_rows=self.config.decoder_rows == "unit")
        if init_from.measured_k:
            self.measured_k.fill_(source.l0)
            pretrained.apply_measured_k(self)
        codes, reconstruction = self._read_local(x)
        return source.compare(self.sae.cfg.architecture(), codes.l0, functional.fvu(x, reconstruction).item())

    def learn(
        self,
        x: Float[Tensor, "rows d_in"],
        optimizer: Optimizer,
        *,
        backward: Backward,
        extra_loss: ExtraLoss | None = None,
        objective: ReconstructionLoss | None = None,
    ) -> ForwardResult:
        """One optimiser step on the rows of all ranks, in micro-batches.

        The `objective` takes the place of the architecture's squared error. `extra_loss` gives this rank's share of a loss that is summed
        over ranks; it is added once, after the backward pass of the rows' loss. Ranks that shard the latents exchange their rows, and each
        computes on all of them.

        The order is that of arXiv 2406.04093, with the renormalisation last: gradient, removal of its radial part, clipping, step,
        unit rows. A step that the guard skips changes only `rows_seen` and the guard's counts; its result has `applied=False`.
        """
        optimizer.zero_grad()
        if self.guard is not None:
            self.guard.remember(self._forward_state())
        count, local_rows = int(self.parallelism.world.sum_scalar(len(x), x)), self.parallelism.tensor_group.rank_slice(len(x), x)
        compute = partial(self.compute_gradients, count=count, backward=backward, extra_loss=extra_loss, objective=objective)
        constants, rows = () if extra_loss is None else extra_loss.constants, self.parallelism.tensor_group.all_gather_rows(x)
        graph = None if constants is None else self.step_graph
        gradients = compute(rows) if graph is None or constants is None else graph.gradients(rows, compute, constants)
        # SAELens does not update its threshold when no latent fires.
        updates = sum(self.parallelism.world.sum_scalar(part.codes.values.numel(), rows) > 0 for part in gradients.results)
        reduce_gradients(self, self.parallelism)
        result = replace(concatenate_results(gradients.results), extra=gradients.extra)
        if not self.parallelism.tensor_group.is_single:
            result = result.select_rows(local_rows, self._gather_codes(result.codes))
        if self.guard is not None and self.guard.skips(
            step_tensors(self.role, self, result.loss, result.extra.loss), self._forward_state(), self.parallelism.world
        ):
            self.rows_seen += count
            return replace(result, applied=False)
        self.cached_support, self.updates = None, self.updates + (0 if self.is_frozen else updates)
        self._constrain_gradient()
        optimizer.step()
        self._renormalize()
        self._update_statistics(result.codes, count)
        return result

    def compute_gradients(
        self, x: Tensor, *, count: int, backward: Backward, extra_loss: ExtraLoss | None = None, objective: ReconstructionLoss | None = None
    ) -> StepGradients:
        """Forward and backward pass of each micro-batch and of the extra loss; results have no graph.

        `count` is the number of rows over all ranks, which losses are divided by.
        """
        results: list[ForwardResult] = []
        if extra_loss is not None:
            extra_loss.start()
        # Every rank makes the same number of parts, because the ranks communicate in each of them.
        for i, (rows, part) in enumerate(micro_batches(x, self.config.micro_batches, objective)):
            # Some optimisers' zero_grad keeps the gradient: it then lies in the buffer that a fresh gradient would be written to.
            result = self._forward(rows, part, fresh_gradients=i == 0 and pretrained.decoder_gradient(self.sae) is None)
            share = len(rows) / count
            backward(result.loss if share == 1 else result.loss * share)
            results.append(replace(result, loss=result.loss.detach()))
        loss, values = ExtraTerm() if extra_loss is None else extra_loss.finish()
        if loss is not None:  # in a backward pass of its own, which adds its gradient to that of the rows' loss in place
            backward(loss)
            loss = loss.detach()
        return StepGradients(results, ExtraTerm(loss, {name: value.detach() for name, value in values.items()}))

    def _forward_state(self) -> dict[str, Tensor]:
        """Buffers that a forward pass changes; they are restored when the step is skipped."""
        return dict(self.sae.named_buffers())

    @property
    def cached_support(self) -> tuple[Tensor, Tensor] | None:
        """Rows and latents of the nonzeros that `read` with `reuse_support` keeps; None from an applied step to the next such call."""
        return self.forward_pass.cached_support

    @cached_support.setter
    def cached_support(self, indices: tuple[Tensor, Tensor] | None) -> None:
        self.forward_pass.cached_support = indices

    @torch.no_grad()
    def read(
        self, x: Float[Tensor, "rows d_in"], *, reuse_support: bool = False, reuse_output: bool = False, keep: Keep | None = None
    ) -> tuple[Codes, Float[Tensor, "rows d_in"]]:
        """Codes and reconstruction by the training rule, without gradient and without any change to the learner's statistics.

        `reuse_support`: for rows that moved little, keep the active latents of the first such call since the last applied step, without
        top-k. `reuse_output`: return a shared buffer, valid until any SAE's next such call. `keep`: reconstruct from those of the codes
        for which it is true. Sharded latents ignore all options.
        """
        if self.parallelism.tensor_group.is_single:
            return self._read_local(x, reuse_support=reuse_support, reuse_output=reuse_output, keep=keep)
        local_rows = self.parallelism.tensor_group.rank_slice(len(x), x)
        codes, reconstruction = self._read_local(self.parallelism.tensor_group.all_gather_rows(x))
        return codes.slice_rows(local_rows), reconstruction[local_rows]

    def reconstruct(self, x: Float[Tensor, "rows d_in"], *, reuse_support: bool = False) -> Float[Tensor, "rows d_in"]:
        """The reconstruction of rows by the frozen learner: `read` without the codes."""
        return self.read(x, reuse_support=reuse_support)[1]

    def _read_local(self, x: Tensor, **options: Any) -> tuple[Codes, Tensor]:
        """Codes in all latents and reconstruction of rows that are the same on all ranks that shard the latents."""
        z, undo = self.normalizer.normalize(x)
        codes, reconstruction = self.forward_pass.read(z, **options)
        return self._gather_codes(codes), self.normalizer.restore(reconstruction, undo).to(x.dtype)

    def _gather_codes(self, codes: Codes) -> Codes:
        """Codes in all latents, from the codes of each rank's shard of latents."""
        if self.parallelism.tensor_group.is_single:  # without reading `W_dec`, which may be computed
            return codes
        return gather_codes(codes, shard_offset(self.W_dec, self.parallelism.tensor_group), len(self.W_dec), self.parallelism.tensor_group)

    def _forward(self, x: Tensor, objective: ReconstructionLoss | None, *, fresh_gradients: bool) -> ForwardResult:
        """The training forward pass on raw rows; the loss is in normalised space, the reconstruction in raw space."""
        z, undo = self.normalizer.normalize(x)
        restore = partial(self.normalizer.restore, undo=undo)
        train = partial(forward_frozen, self.forward_pass) if self.is_frozen else self.forward_pass.train
        out = train(z, dead=self.dead, step=self.steps, fresh_gradients=fresh_gradients)
        out = out if self.head is None else add_head(out, self.head, z, self.config.head_training)
        return (out if objective is None else out.with_objective(objective, restore)).in_raw_space(restore)

    @torch.no_grad()
    def _constrain_gradient(self) -> None:
        """Remove the radial part of the decoder's gradient, for unit rows, and clip the norm of the whole gradient."""
        gradient = pretrained.decoder_gradient(self.sae)
        if self.config.decoder_rows == "unit" and gradient is not None:
            remove_radial(local(gradient), local(self.W_dec))
        if self.config.clip_grad_norm is not None:
            clip_gradients(self.sae, self.head, self.config.clip_grad_norm, together=self.config.head_training == "joint")

    @torch.no_grad()
    def _renormalize(self) -> None:
        """Scale the decoder rows to length 1, for unit rows."""
        if self.config.decoder_rows == "unit" and not self.W_dec.is_meta and not self.is_frozen:
            write_unit_rows(local(self.W_dec), into=local(self.W_dec))
        # Without this, one autocast context around several steps (outside Lightning) would keep using the weights cast before the first.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _update_statistics(self, codes: Codes, rows: int) -> None:
        """Count the step, its rows and each latent's silence. With `batch_cut: local`, average the ranks' thresholds."""
        self.steps += 1
        self.rows_seen += rows
        self.silent_for.add_(rows).index_fill_(0, codes.latents, 0)
        self.parallelism.world.all_reduce_min_(self.silent_for)
        if self.forward_pass.parallelism.data_group.is_single and not self.parallelism.data_group.is_single and not self.is_frozen:
            average_buffers(self.sae, self.parallelism.world)

    def step_stats(self, x: Float[Tensor, "rows d_in"], result: ForwardResult) -> StepStats:
        """Loss, FVU, L0 and dead fraction of a step, over the rows of all ranks; `x` are this rank's rows."""
        return step_stats(x, result, compute_dead=lambda: self.dead, ranks=self.parallelism.world)

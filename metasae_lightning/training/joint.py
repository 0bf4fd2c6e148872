"""Joint training: a primary SAE on activations, a meta SAE on its decoder, and the penalty that one puts on the other."""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metasae_lightning import functional
from metasae_lightning.compute.process_group import Crew, Ranks
from metasae_lightning.compute.row_chunks import order
from metasae_lightning.compute.sharding import own, share, whole
from metasae_lightning.errors import InputError
from metasae_lightning.penalties import Critic, Penalties, Penalty
from metasae_lightning.sae import TrainingSAEConfig
from metasae_lightning.sae.forward import BatchCut, Kernels
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.sae.init_from import InitFrom, InitReport
from metasae_lightning.sae.learner import Learner, LearnerConfig
from metasae_lightning.sae.nonfinite import attach_guards, longest_skip, restore_guards, skipped_steps
from metasae_lightning.schedules import bind_schedule, meta_steps_after, meta_steps_in
from metasae_lightning.step import Batch, Evaluation, StepOutput, StepStats
from metasae_lightning.training import argument_checks


def adam(params: Iterable[Any]) -> Optimizer:
    """The author's optimiser: Adam at 3e-4 with betas (0.9, 0.99), no schedule."""
    return Adam(params, lr=3e-4, betas=(0.9, 0.99), fused=True)


class JointSAE(LightningModule):
    """A primary SAE trained jointly with a meta SAE that judges how decomposable its decoder rows are (arXiv 2604.03436).

    Each macro-step is `n_p` primary steps on activations, then `n_m` meta steps on the decoder. With `meta: null` and `penalties: {}`
    it trains the solo SAE.

    Args:
        primary: SAELens training config of the SAE on activations.
        meta: SAELens training config of the SAE on the primary's decoder rows, or none.
        penalties: What joins the primary's loss, by the name it is logged under.
        n_p: Primary optimiser steps in a macro-step.
        n_m: Meta optimiser steps in a macro-step.
        decoder_rows: `unit` projects the decoder's gradient and renormalises after every step; `free` leaves both alone, as SAELens.
        b_dec_init: The primary's decoder bias from the first batch.
        primary_optimizer: Called with the primary's parameters.
        meta_optimizer: Called with the meta's parameters.
        primary_scheduler: Called with the primary's optimiser, stepped after each of its steps.
        meta_scheduler: Called with the meta's optimiser, stepped after each of its steps.
        clip_grad_norm: Largest gradient norm of each SAE, or none.
        micro_batches: Into how many parts a batch is split, their gradients accumulated before the one step.
        dead_after_tokens: A primary latent silent for so many tokens is dead.
        meta_dead_after_steps: A meta latent silent for so many meta steps, times the rows that each reads, is dead.
        seed: Seed of both SAEs' initial weights.
        hook: Which of the data's hooks this one reads, where they give several.
        init_from: An SAE whose weights the primary starts from: a run, a SAELens folder, or RELEASE:ID on the Hub.
        meta_init_from: The same for the meta SAE.
        critic_supports: When the critic ranks its latents: at every step, or, an approximation, at the first after each meta phase.
        meta_rows: How many rows, drawn anew, a meta step reads; none is all of them, as in the paper.
        kernels: `sparse` leaves zeros out where the architecture is of the top-k family; `dense` is SAELens's own forward pass.
        batch_cut: Whether a batch top-k SAE keeps the largest activations of all ranks' batches together, `global`, or of each, `local`.
        non_finite: Whether `StopOnNaN` ends the run where a loss or gradient is not finite, `stop`, or all ranks skip the step, `skip`.
    """

    critic_supports: Literal["exact", "macro_step"]
    kernels: Kernels
    batch_cut: BatchCut
    crew: Crew = Crew()

    def __init__(
        self,
        primary: TrainingSAEConfig,
        meta: TrainingSAEConfig | None = None,
        penalties: dict[str, Penalty] | None = None,
        *,
        n_p: int = 10,
        n_m: int = 5,
        decoder_rows: Literal["unit", "free"] = "unit",
        b_dec_init: Literal["zeros", "mean", "geometric_median"] = "geometric_median",
        primary_optimizer: OptimizerCallable = adam,
        meta_optimizer: OptimizerCallable = adam,
        primary_scheduler: LRSchedulerCallable | None = None,
        meta_scheduler: LRSchedulerCallable | None = None,
        clip_grad_norm: float | None = None,
        micro_batches: int = 1,
        dead_after_tokens: int = 20_480,
        meta_dead_after_steps: int = 5,
        seed: int = 0,
        hook: str | None = None,
        init_from: InitFrom | str | None = None,
        meta_init_from: InitFrom | str | None = None,
        critic_supports: Literal["exact", "macro_step"] = "exact",
        meta_rows: int | None = None,
        kernels: Kernels = "sparse",
        batch_cut: BatchCut = "global",
        non_finite: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        self.hook = hook
        self.automatic_optimization = False
        self.penalties = Penalties(penalties or {})
        counts = {"n_p": n_p, "n_m": n_m, "micro_batches": micro_batches, "dead_after_tokens": dead_after_tokens}
        argument_checks.check_roles(primary, meta, self.penalties, counts)
        argument_checks.check_choices(self.penalties, kernels=kernels, critic_supports=critic_supports, non_finite=non_finite)
        argument_checks.check_optional_values(
            primary, meta, clip_grad_norm=clip_grad_norm, meta_rows=meta_rows, meta_init_from=meta_init_from
        )
        self.n_p, self.n_m, self.meta_rows, self.seed = n_p, n_m, meta_rows, seed
        self.critic_supports, self.kernels, self.batch_cut = critic_supports, kernels, batch_cut
        options = partial(LearnerConfig, decoder_rows=decoder_rows, clip_grad_norm=clip_grad_norm, kernels=kernels)
        of_primary = options(dead_after_tokens, b_dec_init=b_dec_init, micro_batches=micro_batches, init_from=InitFrom.of(init_from))
        self.primary = Learner(primary, of_primary, role="primary", seed=seed)
        self.meta: Learner | None = None
        if meta is not None:
            window, source = meta_dead_after_steps * (meta_rows or primary.d_sae), InitFrom.of(meta_init_from)
            self.meta = Learner(meta, options(window, n_fixed_rows=primary.d_sae, init_from=source), role="meta", seed=seed + 1)
        self.guards = attach_guards(self.primary, self.meta) if non_finite == "skip" else {}
        self._optimizer_callables = {"primary": primary_optimizer, "meta": meta_optimizer}
        self._scheduler_callables = {"primary": primary_scheduler, "meta": meta_scheduler}
        self._schedules: dict[str, LRScheduler] = {}

    def step(
        self, batch: Batch, primary_optimizer: Optimizer, meta_optimizer: Optimizer | None = None, *, last: bool = False
    ) -> StepOutput:
        """One primary step and, where it ends a macro-step, the meta phase: the algorithm."""
        if not self.primary.initialized:  # by what all ranks' first batches say
            _tell(self.primary.initialize(self.crew.all.together(batch.activations)), "primary")
        if self.meta is not None and self.primary.initialized and not self.meta.initialized:  # before it first judges
            _tell(self.meta.initialize(functional.unit_rows(whole(self.primary.W_dec.detach()))), "meta")
        penalty, values = self.penalties.loss(*self._penalty_args())
        values = self.penalties.values_by_name(*self._penalty_args(), values, critic_is_trained=self._critic_is_trained)
        seen = self.primary.learn(batch.activations, primary_optimizer, backward=self._backward, extra_loss=penalty)
        self._advance(self.primary, seen)
        reading = self.primary.step_stats(batch.activations, seen)
        owed = meta_steps_after(int(self.primary.steps), n_p=self.n_p, n_m=self.n_m, last=last, applied=seen.applied)
        judged = self._meta_phase(owed, meta_optimizer)
        if last:  # the run ends on what the last critic makes of the last decoder
            values = self.penalties.values_by_name(*self._penalty_args(), {}, critic_is_trained=self._critic_is_trained)
        loss = reading.loss if penalty is None else reading.loss + self.crew.all.summed(penalty)
        skips = longest_skip(self.guards.values())
        return StepOutput(loss, reading, seen.codes, seen.reconstruction, penalties=values, meta=judged, **skips)

    def evaluate(self, batch: Batch) -> Evaluation:
        """Codes and reconstruction of a batch by the training rule; nothing moves."""
        return Evaluation(batch.activations, *self.primary.read(batch.activations))

    def join(self, ranks: Ranks, mesh: Any = None) -> None:
        """Train beside other ranks: batches are parts of one, and the penalty's and the meta SAE's rows are divided.

        On a mesh, as Lightning's `ModelParallelStrategy` makes it, the primary's latents are divided along its second side.
        """
        argument_checks.check_ranks(ranks, self.critic_supports)
        self.crew = Crew.of(ranks, mesh)
        self.primary.join(self.crew, self.batch_cut)
        if mesh is not None:
            self.primary.divide(mesh["tensor_parallel"])
        if self.meta is not None:  # each has all of it
            self.meta.join(Crew.of(ranks), self.batch_cut)

    @property
    def rows_seen(self) -> int:
        """Tokens trained on, over all ranks."""
        return int(self.primary.rows_seen)

    def _penalty_args(self) -> tuple[Tensor, Critic | None, int, Crew]:
        """What penalties are made of."""
        reuse_support = self.critic_supports == "macro_step"
        critic = None if self.meta is None else partial(self.meta.reconstruct, reuse_support=reuse_support, reuse_output=True)
        return self.primary.W_dec, critic, int(self.primary.steps), self.crew

    @property
    def _critic_is_trained(self) -> bool:
        return self.meta is None or bool(self.meta.steps)

    def _meta_phase(self, steps: int, optimizer: Optimizer | None) -> StepStats | None:
        """So many meta steps on the decoder as it is now, and what the last of them showed."""
        if self.meta is None or not steps:
            return None
        assert optimizer is not None
        decoder, judged = self.primary.W_dec.detach(), None
        rows = functional.unit_rows(own(decoder))
        for left in reversed(range(steps)):
            chosen = None
            if self.meta_rows is not None:  # not in the order that a penalty of the same seed draws
                chosen = order(len(decoder), step=int(self.meta.steps), seed=self.seed + 1)[: self.meta_rows]
            mine = share(decoder, chosen, self.crew)
            seen = self.meta.learn(some := rows if mine is None else rows[mine], optimizer, backward=self._backward)
            self._advance(self.meta, seen)
            judged = None if left else self.meta.step_stats(some, seen)
        return judged

    def _backward(self, loss: Tensor) -> None:
        if self._trainer is None:  # a notebook, a test: there is no strategy and no scaler to go through
            return loss.backward()
        # Gradients are summed once, before the step that takes them: not by each of its passes.
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            self.manual_backward(loss)

    def _advance(self, learner: Learner, seen: ForwardResult) -> None:
        if not seen.applied and learner.guard is not None:
            reason = f"{learner.guard.bad_tensor} was not finite"
            rank_zero_info(f"{learner.role}: a step was left out after {self.rows_seen:,} tokens: {reason}")
        elif learner.role in self._schedules:
            self._schedules[learner.role].step()

    def setup(self, stage: str) -> None:
        """Check the data against the SAEs, and let penalties look at the trainer."""
        if stage == "fit":
            argument_checks.check_trainer(self.trainer)
        self.join(Ranks.joined(), getattr(self.trainer.strategy, "device_mesh", None))
        argument_checks.check_data(getattr(self.trainer, "datamodule", None), self.hook, self.primary.sae.cfg.d_in)
        for penalty in self.penalties.values():
            penalty.setup(self.trainer)  # pyright: ignore

    def configure_model(self) -> None:
        """Lightning's place for dividing a module; `setup` has done it."""

    def on_fit_start(self) -> None:
        """Have what is wrong with an SAE to start from said before the run begins, where it is known whether it goes on."""
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            self._open_origins()

    def on_train_start(self) -> None:
        """Or else now."""
        self._open_origins()
        argument_checks.check_batches(self.trainer, self.crew.all, self.rows_seen)

    def _open_origins(self) -> None:
        """Look at the SAEs to start from; a run that goes on does not need them."""
        tell = getattr(getattr(self.trainer, "datamodule", None), "metadata", None)
        for learner in filter(None, (self.primary, self.meta)):
            if learner.config.init_from is not None and not learner.initialized:
                learner.config.init_from.open(learner.role, learner.sae.cfg)
                if learner is self.primary and tell is not None:
                    learner.config.init_from.check(tell(*([self.hook] if self.hook else [])))

    def configure_optimizers(self) -> Any:
        """One optimiser, and one schedule where given, for each SAE."""
        steps = self.trainer.estimated_stepping_batches
        optimizers: list[Optimizer] = []
        for name, learner in (("primary", self.primary), ("meta", self.meta)):
            if learner is None:
                continue
            optimizer = self._optimizer_callables[name](learner.parameters())
            optimizers.append(optimizer)
            if (scheduler := self._scheduler_callables[name]) is not None:
                own = steps if name == "primary" else meta_steps_in(steps, n_p=self.n_p, n_m=self.n_m)
                self._schedules[name] = bind_schedule(scheduler(optimizer), own, name)
        return optimizers, list(self._schedules.values())

    def advance(self, batch: Batch, optimizers: Any) -> StepOutput:
        """A step under a trainer, which knows whether it is the last."""
        primary, meta = optimizers if self.meta is not None else (*optimizers, None)
        last = self.trainer.is_last_batch and self.trainer.current_epoch + 1 == self.trainer.max_epochs
        return self.step(batch.select_hook(self.hook), primary, meta, last=last)

    def training_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """Fetch the optimisers, step, log; callbacks find the StepOutput under `output`."""
        optimizers: Any = self.optimizers()
        output = self.advance(Batch.of(batch), optimizers if isinstance(optimizers, list) else [optimizers])
        self.log_dict(self.scalars(output), batch_size=len(output.reconstruction))
        return {"loss": output.loss, "output": output}

    def validation_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """Callbacks find the Evaluation under `output`."""
        return {"output": self.evaluate(Batch.of(batch).select_hook(self.hook))}

    test_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a critic holds is of an earlier step's decoder: it cannot be found again."""
        checkpoint["critic_supports"] = None if self.meta is None else self.meta.cached_support
        checkpoint["guards"] = {role: guard.state_dict() for role, guard in self.guards.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See above."""
        if "arms" in checkpoint:
            raise InputError(f"the checkpoint holds the arms {', '.join(checkpoint['arms'])}: go on with the recipe that has them")
        if self.meta is not None:
            self.meta.cached_support = checkpoint.get("critic_supports")
        restore_guards(self.guards, checkpoint.get("guards", {}))

    def scalars(self, output: StepOutput) -> dict[str, Any]:
        """What a step logs."""
        return {**output.scalars(), "train/tokens": float(self.primary.rows_seen), **skipped_steps(self.guards.values())}


def _tell(adopted: InitReport | None, role: str) -> None:
    if adopted is not None:
        rank_zero_info(f"{role} {adopted}")

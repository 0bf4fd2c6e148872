"""Joint training: a primary SAE on activations, a meta SAE on its decoder rows, and penalties on the primary's decoder."""

from functools import partial
from typing import Any, Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metasae_lightning import functional
from metasae_lightning.compute.process_group import Parallelism, ProcessGroup
from metasae_lightning.compute.row_chunks import step_permutation
from metasae_lightning.compute.sharding import local, local_rows
from metasae_lightning.errors import InputError
from metasae_lightning.heads import Head
from metasae_lightning.objectives import Objective
from metasae_lightning.penalties import Critic, Penalties, Penalty, PenaltyLoss
from metasae_lightning.sae import TrainingSAEConfig
from metasae_lightning.sae.critic import LearnerCritic
from metasae_lightning.sae.forward import BatchCut, Kernels
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.sae.gpu_layout import match_parameters
from metasae_lightning.sae.head_loss import HeadTraining
from metasae_lightning.sae.init_from import InitFrom
from metasae_lightning.sae.learner import Learner, LearnerConfig
from metasae_lightning.sae.nonfinite import attach_guards, longest_skip, restore_guards, skipped_steps
from metasae_lightning.schedules import bind_schedule, meta_steps_after, meta_steps_in
from metasae_lightning.step import Batch, Evaluation, StepOutput, StepStats
from metasae_lightning.training import argument_checks, step_memory
from metasae_lightning.training.backward_pass import run_backward
from metasae_lightning.training.initialize import initialize_saes
from metasae_lightning.training.logging_interval import is_logged
from metasae_lightning.training.optimizers import adam


class JointSAE(LightningModule):
    """A primary SAE trained jointly with a meta SAE that judges how decomposable its decoder rows are (arXiv 2604.03436).

    A macro-step is `n_p` primary steps on activations, then `n_m` meta steps on the decoder rows. With `meta: null` and `penalties: {}`
    the module trains the primary alone: the solo SAE.

    Args:
        primary: SAELens training config of the SAE on activations.
        meta: SAELens training config of the SAE on the primary's decoder rows, or none.
        penalties: Penalties that are added to the primary's loss; each key is the name in the logs.
        n_p: Primary optimiser steps in a macro-step.
        n_m: Meta optimiser steps in a macro-step.
        decoder_rows: `unit` projects the decoder's gradient and renormalises after every step; `free` leaves both alone, as SAELens.
        b_dec_init: How the primary's decoder bias is initialised: zeros, or the mean or geometric median of the first batch.
        primary_optimizer: Makes the primary's optimiser from its parameters.
        meta_optimizer: Makes the meta SAE's optimiser from its parameters.
        primary_scheduler: Makes the primary's learning rate schedule from its optimiser; one schedule step for each optimiser step.
        meta_scheduler: Makes the meta SAE's learning rate schedule from its optimiser; one schedule step for each optimiser step.
        clip_grad_norm: Largest gradient norm of each SAE; null does not clip.
        micro_batches: Number of parts that a batch is split into; gradients of the parts are accumulated before the one step.
        dead_after_tokens: A primary latent that did not fire for this many tokens is dead.
        meta_dead_after_steps: A meta latent that did not fire for this many full meta steps is dead.
        seed: Seed of the initial weights of both SAEs, and of the rows drawn for `meta_rows`.
        hook: The hook whose activations this module trains on; needed where the data have several hooks.
        init_from: The SAE whose weights the primary starts from: a run, a SAELens folder, or RELEASE:ID on the Hub.
        meta_init_from: The SAE whose weights the meta SAE starts from: a run, a SAELens folder, or RELEASE:ID on the Hub.
        critic_supports: When the critic runs top-k: `exact`, at every step; `macro_step`, once after each meta phase (approximate).
        meta_rows: Number of decoder rows, drawn anew, that a meta step reads; null reads all rows, as in the paper.
        kernels: `sparse` skips zeros for architectures of the top-k family; `dense` is SAELens's own forward pass.
        batch_cut: A batch top-k SAE keeps the largest activations of all ranks' batches together (`global`) or of each rank's (`local`).
        non_finite: On a loss or gradient that is not finite: `stop` lets `StopOnNaN` end the run; `skip` skips the step on all ranks.
        cuda_graph: On one GPU, replay a step's gradient as a CUDA graph where starting its kernels takes longer than running them.
        objective: A loss of the primary's reconstruction in place of its squared error, such as `EndToEnd`; null is the squared error.
        head: A second path from the primary's codes to its reconstruction, such as `InteractionHead`; null has none.
        head_training: `joint` trains SAE and head on the error of the sum; `detached` leaves the SAE's training as it is without a head;
            `frozen_sae` trains the head alone, on the SAE of `init_from`.
    """

    critic_supports: Literal["exact", "macro_step"]
    kernels: Kernels
    batch_cut: BatchCut
    parallelism: Parallelism = Parallelism()

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
        cuda_graph: bool = True,
        objective: Objective | None = None,
        head: Head | None = None,
        head_training: HeadTraining = "joint",
    ) -> None:
        super().__init__()
        self.automatic_optimization, self.hook = False, hook
        self.penalties = Penalties(penalties or {}, group_size=getattr(primary, "group_size", 1))
        counts = {"n_p": n_p, "n_m": n_m, "micro_batches": micro_batches, "dead_after_tokens": dead_after_tokens}
        argument_checks.check_roles(primary, meta, self.penalties, counts)
        argument_checks.check_objective(objective, primary)
        argument_checks.check_head(head, head_training, objective, init_from)
        argument_checks.check_choices(self.penalties, kernels=kernels, critic_supports=critic_supports, non_finite=non_finite)
        argument_checks.check_optional_values(
            primary, meta, clip_grad_norm=clip_grad_norm, meta_rows=meta_rows, meta_init_from=meta_init_from
        )
        self.n_p, self.n_m, self.meta_rows, self.seed = n_p, n_m, meta_rows, seed
        self.critic_supports, self.kernels, self.batch_cut, self.objective = critic_supports, kernels, batch_cut, objective
        use_graph, source = cuda_graph and critic_supports == "exact" and objective is None and head is None, InitFrom.of(init_from)
        options = partial(LearnerConfig, decoder_rows=decoder_rows, clip_grad_norm=clip_grad_norm, kernels=kernels, cuda_graph=use_graph)
        of_primary = options(
            dead_after_tokens, b_dec_init=b_dec_init, micro_batches=micro_batches, init_from=source, head_training=head_training
        )
        self.primary = Learner(primary, of_primary, role="primary", seed=seed, head=head)
        self.meta: Learner | None = None
        if meta is not None:
            window, source = meta_dead_after_steps * (meta_rows or primary.d_sae), InitFrom.of(meta_init_from)
            self.meta = Learner(meta, options(window, n_fixed_rows=primary.d_sae, init_from=source), role="meta", seed=seed + 1)
            self.primary.add_critic(self.meta)
        self.guards = attach_guards(self.primary, self.meta) if non_finite == "skip" else {}
        self._optimizer_callables = {"primary": primary_optimizer, "meta": meta_optimizer}
        self._scheduler_callables = {"primary": primary_scheduler, "meta": meta_scheduler}
        self._schedules: dict[str, LRScheduler] = {}

    def step(
        self, batch: Batch, primary_optimizer: Optimizer, meta_optimizer: Optimizer | None = None, *, last: bool = False
    ) -> StepOutput:
        """Take one primary step and, at the end of a macro-step or the run (`last`), the meta phase. The first step initialises SAEs."""
        initialize_saes(self.primary, self.meta, batch.activations, self.parallelism.world)
        objective, extra_loss = self.objective and self.objective.of(batch.contexts), self._penalty_loss()
        result = self.primary.learn(
            batch.activations, primary_optimizer, backward=partial(run_backward, self), extra_loss=extra_loss, objective=objective
        )
        self._step_schedule(self.primary, result)
        (penalty, values), stats = result.extra, self.primary.step_stats(batch.activations, result)
        meta_steps = meta_steps_after(self.primary.steps, n_p=self.n_p, n_m=self.n_m, last=last, applied=result.applied)
        meta_stats = self._meta_phase(meta_steps, meta_optimizer)
        if last:  # report the final decoder's penalties, by the final critic
            values = self.penalties.values_by_name(*self._penalty_args(), {}, critic_is_trained=self._critic_is_trained)
        loss = stats.loss if penalty is None else stats.loss + self.parallelism.world.sum_tensor(penalty)
        skips = longest_skip(self.guards.values())
        return StepOutput(loss, stats, result.codes, lambda: result.reconstruction, penalties=values, meta=meta_stats, **skips)

    def evaluate(self, batch: Batch) -> Evaluation:
        """Codes and reconstruction of a batch, with the activation function of training. Changes no state."""
        return Evaluation(batch.activations, *self.primary.read(batch.activations))

    def join(self, ranks: ProcessGroup, mesh: Any = None) -> None:
        """Train together with other ranks, on parts of one batch; on a device mesh, shard the primary over `tensor_parallel` ranks."""
        argument_checks.check_ranks(ranks, self.critic_supports)
        self.parallelism = Parallelism.of(ranks, mesh)
        self.primary.join(self.parallelism, self.batch_cut)
        if mesh is not None:
            self.primary.divide(mesh["tensor_parallel"])
        if self.meta is not None:  # every rank has the whole meta SAE
            self.meta.join(Parallelism.of(ranks), self.batch_cut)

    @property
    def rows_seen(self) -> int:
        """Tokens that training has read, over all ranks; those of skipped steps count."""
        return self.primary.rows_seen

    def _penalty_loss(self) -> PenaltyLoss:
        """The penalties at the decoder before this step."""
        compute = partial(self.penalties.loss_and_values, *self._penalty_args(), critic_is_trained=self._critic_is_trained)
        reset = None if self.meta is None else partial(setattr, self.meta, "cached_support", self.meta.cached_support)
        constants = self.penalties.constants(self.primary.steps, critic_is_trained=self._critic_is_trained)
        return PenaltyLoss(compute, constants=constants, before_retry=reset, is_single=self.parallelism.world.is_single)

    def _penalty_args(self) -> tuple[Tensor, Critic | None, int, Parallelism]:
        """Arguments of every penalty: decoder, critic (the frozen meta SAE), primary step, process groups."""
        critic = None if self.meta is None else LearnerCritic(self.meta, reuse_support=self.critic_supports == "macro_step")
        return self.primary.W_dec, critic, self.primary.steps, self.parallelism

    @property
    def _critic_is_trained(self) -> bool:
        """Whether the meta SAE has taken a step, or there is none: an untrained critic says nothing about the decoder."""
        return self.meta is None or self.meta.steps > 0

    def _meta_phase(self, steps: int, optimizer: Optimizer | None) -> StepStats | None:
        """Take `steps` meta steps on the current decoder rows; returns the statistics of the last step, or None if there was no step."""
        if self.meta is None or not steps:
            return None
        assert optimizer is not None
        decoder, stats = self.primary.W_dec.detach(), None
        rows = functional.unit_rows(local(decoder))
        for steps_left in reversed(range(steps)):
            drawn = None
            if self.meta_rows is not None:  # another seed than a penalty's, which would draw the same rows
                drawn = step_permutation(len(decoder), step=self.meta.steps, seed=self.seed + 1)[: self.meta_rows]
            indices = local_rows(decoder, drawn, self.parallelism)
            meta_batch = rows if indices is None else rows[indices]
            result = self.meta.learn(meta_batch, optimizer, backward=partial(run_backward, self))
            self._step_schedule(self.meta, result)
            stats = None if steps_left else self.meta.step_stats(meta_batch, result)
        _ = stats and stats.fvu  # computed now: the next meta step overwrites the buffers of its batch
        return stats

    def _step_schedule(self, learner: Learner, result: ForwardResult) -> None:
        """Step the SAE's learning rate schedule; where its optimiser step was skipped, log the reason instead."""
        if not result.applied and learner.guard is not None:
            reason = f"{learner.guard.bad_tensor} was not finite"
            rank_zero_info(f"{learner.role}: a step was skipped after {self.rows_seen:,} tokens: {reason}")
        elif learner.role in self._schedules:
            self._schedules[learner.role].step()

    def setup(self, stage: str) -> None:
        """Check trainer and data, join the other ranks, and set up penalties."""
        if stage == "fit":
            argument_checks.check_trainer(self.trainer, self.primary.head)
            step_memory.leave_out_graphs(self, self.trainer)
            argument_checks.set_up_objective(self.objective, self.trainer)
        self.join(ProcessGroup.default(), getattr(self.trainer.strategy, "device_mesh", None))
        argument_checks.check_data(getattr(self.trainer, "datamodule", None), self.hook, self.primary.sae.cfg.d_in)
        for penalty in self.penalties.values():
            penalty.setup(self.trainer)  # pyright: ignore

    def teardown(self, stage: str) -> None:
        """Free the memory that training keeps between steps."""
        step_memory.free(self)

    def configure_model(self) -> None:
        """Do nothing: Lightning's strategies require this hook for sharding, and `setup` has sharded the primary already."""

    def on_fit_start(self) -> None:
        """Load the SAEs given by `init_from`, so that an error comes early. If checkpoints are restored later, `on_train_start` does."""
        if not self.trainer.strategy.restore_checkpoint_after_setup:
            argument_checks.open_init_from(self.primary, self.meta, self.trainer, self.hook)

    def on_train_start(self) -> None:
        """Load the SAEs given by `init_from` if `on_fit_start` could not yet; check that all ranks have equally many batches."""
        argument_checks.open_init_from(self.primary, self.meta, self.trainer, self.hook)
        for optimizer in self.trainer.optimizers:
            match_parameters(optimizer)
        argument_checks.check_batches(self.trainer, self.parallelism.world, self.rows_seen)

    def configure_optimizers(self) -> Any:
        """One optimiser for each SAE, and a learning rate schedule for each SAE that has one."""
        steps = self.trainer.estimated_stepping_batches
        learners = filter(None, (self.primary, self.meta))
        optimizers = {learner.role: self._optimizer_callables[learner.role](learner.parameters()) for learner in learners}
        for role, optimizer in optimizers.items():
            if (scheduler := self._scheduler_callables[role]) is not None:
                sae_steps = steps if role == "primary" else meta_steps_in(steps, n_p=self.n_p, n_m=self.n_m)
                self._schedules[role] = bind_schedule(scheduler(optimizer), sae_steps, role)
        return list(optimizers.values()), list(self._schedules.values())

    def advance(self, batch: Batch, optimizers: Any) -> StepOutput:
        """Take a step on the columns of `hook` in the batch; the trainer tells whether it is the last step of the run."""
        last = self.trainer.is_last_batch and self.trainer.current_epoch + 1 == self.trainer.max_epochs
        return self.step(batch.select_hook(self.hook), *optimizers, last=last)

    def training_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """Take a step with Lightning's optimisers and log it; callbacks get the StepOutput under the key `output`."""
        optimizers: Any = self.optimizers()
        output = self.advance(Batch.of(batch), optimizers if isinstance(optimizers, list) else [optimizers])
        if is_logged(self.trainer):
            self.log_dict(self.scalars(output), batch_size=output.codes.shape[0])
        return {"loss": output.loss, "output": output}

    def validation_step(self, batch: Batch | Tensor, batch_idx: int) -> dict[str, Any]:
        """Evaluate a batch; callbacks get the Evaluation under the key `output`."""
        return {"output": self.evaluate(Batch.of(batch).select_hook(self.hook))}

    test_step = validation_step

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counts of skipped steps and the critic's cached support, which cannot be recomputed from the current decoder."""
        checkpoint["critic_supports"] = None if self.meta is None else self.meta.cached_support
        checkpoint["guards"] = {role: guard.state_dict() for role, guard in self.guards.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counts of skipped steps and the critic's cached support. A checkpoint of several arms is an error."""
        if "arms" in checkpoint:
            raise InputError(f"the checkpoint holds the arms {', '.join(checkpoint['arms'])}: go on with the recipe that has them")
        if self.meta is not None:
            self.meta.cached_support = checkpoint.get("critic_supports")
        restore_guards(self.guards, checkpoint.get("guards", {}))

    def scalars(self, output: StepOutput) -> dict[str, Any]:
        """The values that a step logs, by name."""
        return {**output.scalars(), "train/tokens": float(self.primary.rows_seen), **skipped_steps(self.guards.values())}

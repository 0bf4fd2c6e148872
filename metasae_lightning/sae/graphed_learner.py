"""A learner whose whole step, its optimiser's too, is a CUDA graph: for many short steps at a constant learning rate."""

# pyright: reportPrivateUsage=false

from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from torch import Tensor
from torch.optim import Adam

from metasae_lightning.compute.gpu.passes import triton_kernels
from metasae_lightning.sae.forward import SparseForward
from metasae_lightning.sae.learner import Learner
from metasae_lightning.sae.recording import Capture, Recording, StepGradients, record
from metasae_lightning.sae.step_graph import STEPS_BEFORE, cuda_graph


class GraphedLearner:
    """Takes steps of a learner on batches of one size, in a single process.

    A step whose search has too few candidates, or in which latents have died, changes nothing and is taken again without the graph.

    Args:
        learner: A batch top-k SAE for which `can_be_graphed` is true.
        optimizer: Its fused Adam, made with `capturable`.
        capture: How a step is recorded; the default is a CUDA graph.
    """

    def __init__(self, learner: Learner, optimizer: Adam, capture: Capture | None = None) -> None:
        assert isinstance(learner.forward_pass, SparseForward)
        self.learner, self.optimizer, self._capture = learner, optimizer, capture or cuda_graph
        self._forward_pass = learner.forward_pass
        self._steps, self._is_off = 0, False
        self._recording: Recording | None = None
        self.retaken = 0
        """Number of steps that were taken again without the graph."""

    def learn(self, x: Float[Tensor, "rows d_in"]) -> None:
        """One step on the rows."""
        self._steps += 1
        if self._is_off or self._steps <= STEPS_BEFORE or not isinstance(self._forward_pass.last_cut, Tensor):
            self._learn_eagerly(x)
            return
        learner = self.learner
        counters = learner.steps, learner.updates, learner.rows_seen
        if self._recording is None:
            self._recording = record(x, self._gradients, [self._forward_pass], self._capture, self._finish)
            self._is_off = self._recording is None
        is_right = self._recording is not None and self._recording.replay(x)
        learner.steps, learner.updates, learner.rows_seen = counters
        if is_right:
            learner.steps, learner.updates, learner.rows_seen = counters[0] + 1, counters[1] + 1, counters[2] + len(x)
        else:
            self.retaken += 1
            self._learn_eagerly(x)

    def _learn_eagerly(self, x: Tensor) -> None:
        self.learner.learn(x, self.optimizer, backward=lambda loss: loss.backward())

    def _gradients(self, x: Tensor) -> StepGradients:
        return self.learner.compute_gradients(x, count=len(x), backward=lambda loss: loss.backward())

    def _finish(self, gradients: StepGradients, failed: Tensor) -> None:
        """The step after its gradient. Where `failed` is 1 it changes nothing."""
        learner = self.learner
        optimizer: Any = self.optimizer
        # The optimiser changes no weight in a step that fails, but rescaling rows of unit length changes their last bits.
        rescaled = [learner.W_dec.detach()] if learner.config.decoder_rows == "unit" else []
        state = [learner.silent_for, *rescaled]
        before = [tensor.clone() for tensor in state]
        learner._constrain_gradient()
        # Torch's fused optimisers make no step where this is 1.
        optimizer.found_inf = failed.float()
        optimizer.step()
        del optimizer.found_inf
        learner._renormalize()
        learner._update_statistics(gradients.results[0].codes, gradients.results[0].codes.shape[0])
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(torch.where(failed, old, tensor))


def can_be_graphed(learner: Learner, x: Tensor) -> bool:
    """Whether a learner's steps on rows like `x` can be a CUDA graph."""
    is_sparse = isinstance(learner.forward_pass, SparseForward) and type(learner.sae) is BatchTopKTrainingSAE
    is_plain = learner.guard is None and learner.config.micro_batches == 1 and learner.parallelism.world.is_single
    return triton_kernels(x) is not None and is_sparse and is_plain

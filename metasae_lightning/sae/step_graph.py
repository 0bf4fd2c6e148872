"""A learner's training step as a CUDA graph: the host starts all of its kernels with one call.

The graph holds a step whose search for the largest activations has enough candidates and whose latents are all alive. Whether that was so
is known when the graph has run. If it was not, the graph has changed no weight, buffer or optimiser state, and the step is taken again
without it.
"""

# pyright: reportPrivateUsage=false

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from torch import Tensor
from torch.optim import Adam

from metasae_lightning.compute.gpu.host_reads import deferred_checks
from metasae_lightning.compute.gpu.passes import triton_kernels
from metasae_lightning.sae.forward import SparseForward
from metasae_lightning.sae.learner import Learner

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""A function that records what another function does on the GPU. It returns a function that does the same again."""
# Number of steps before the capture. They create the optimiser's state, compile kernels and find a cut.
STEPS_BEFORE = 4


class GraphedLearner:
    """Takes steps of a learner on batches of one size, in a single process, at a constant learning rate.

    Args:
        learner: A batch top-k SAE for which `can_be_graphed` is true.
        optimizer: Its fused Adam, made with `capturable`.
        capture: How a step is recorded; the default is a CUDA graph.
    """

    def __init__(self, learner: Learner, optimizer: Adam, capture: Capture | None = None) -> None:
        assert isinstance(learner._forward_pass, SparseForward)
        self.learner, self.optimizer, self._capture = learner, optimizer, capture or cuda_graph
        self._forward_pass = learner._forward_pass
        self._steps = 0
        self._replay: Callable[[], None] | None = None
        self.retaken = 0
        """Number of steps that were taken again without the graph."""

    def learn(self, x: Float[Tensor, "rows d_in"]) -> None:
        """One step on the rows."""
        self._steps += 1
        if self._steps <= STEPS_BEFORE or not isinstance(self._forward_pass.last_cut, Tensor):
            self._learn_eagerly(x)
            return
        learner = self.learner
        counters = learner.steps, learner.updates, learner.rows_seen
        replay = self._replay or self._prepare(x)
        self._x.copy_(x)
        replay()
        numbers = self._numbers.tolist()
        if self._then is not None:
            self._then(*numbers)
        learner.steps, learner.updates, learner.rows_seen = counters
        if all(number > 0 for number in numbers):
            learner.steps, learner.updates, learner.rows_seen = counters[0] + 1, counters[1] + 1, counters[2] + len(x)
            self._set_hint(numbers[0])
        else:
            self.retaken += 1
            self._forward_pass.last_cut = None
            self._learn_eagerly(x)
            self._set_hint(float(self._forward_pass.last_cut or 0.0))

    def _learn_eagerly(self, x: Tensor) -> None:
        self.learner.learn(x, self.optimizer, backward=lambda loss: loss.backward())

    def _set_hint(self, edge: float) -> None:
        """Set the next step's hint. The graph multiplies it by the cut factor of the capture, so that is divided out here."""
        self._hint.fill_(edge * self._forward_pass.cut_factor.value / self._captured_factor)
        self._forward_pass.last_cut = self._hint

    def _prepare(self, x: Tensor) -> Callable[[], None]:
        """Make the tensors that the graph reads, and record it."""
        assert isinstance(self._forward_pass.last_cut, Tensor)
        self._x, self._hint = x.clone(), self._forward_pass.last_cut.detach().clone()
        self._captured_factor = self._forward_pass.cut_factor.value
        self._replay = self._capture(self._step)
        return self._replay

    def _step(self) -> None:
        """The step that is recorded."""
        learner = self.learner
        optimizer: Any = self.optimizer
        # The optimiser changes no weight in a step that fails, but rescaling rows of unit length changes their last bits.
        rescaled = [learner.W_dec.detach()] if learner.config.decoder_rows == "unit" else []
        state = [learner.silent_for, *learner.sae.buffers(), *rescaled]
        before = [tensor.clone() for tensor in state]
        optimizer.zero_grad()
        self._forward_pass.last_cut = self._hint
        with deferred_checks() as checks:
            result = learner._forward(self._x, fresh_gradients=True)
        ((numbers, self._then),) = checks.take()
        self._numbers = torch.cat(numbers)
        failed = (self._numbers <= 0).any()
        result.loss.backward()
        learner._constrain_gradient()
        # Torch's fused optimisers make no step where this is 1.
        optimizer.found_inf = failed.float()
        optimizer.step()
        del optimizer.found_inf
        learner._renormalize()
        learner._update_statistics(result.codes, len(self._x))
        for tensor, old in zip(state, before, strict=True):
            tensor.copy_(torch.where(failed, old, tensor))


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step as a CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def can_be_graphed(learner: Learner, x: Tensor) -> bool:
    """Whether a learner's steps on rows like `x` can be a CUDA graph."""
    is_sparse = isinstance(learner._forward_pass, SparseForward) and type(learner.sae) is BatchTopKTrainingSAE
    is_plain = learner.guard is None and learner.config.micro_batches == 1 and learner.parallelism.world.is_single
    return triton_kernels(x) is not None and is_sparse and is_plain

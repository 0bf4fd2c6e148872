"""The gradient of a learner's step as a CUDA graph: the host starts all of its kernels with one call.

A graph repeats the recorded kernels. Its result is right only if the search again finds enough candidates, and the dead latents again need
the same padding. The host reads this after each replay. If it is not so, buffers are put back, and the gradient is computed without the
graph. The optimiser's step is not in the graph, so that optimisers and learning rate schedules work as they do without one.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.gpu.passes import triton_kernels
from metasae_lightning.sae.forward import SparseForward
from metasae_lightning.sae.recording import Capture, Compute, Recording, StepGradients, record

# Number of steps with equal settings, computed without a graph, before a recording. The number doubles with each recording.
STEPS_BEFORE = 4
# Number of replays in a row that may fail before the recording is given up.
FAILURES = 3
# Number of replays that are compared with a step without the graph.
COMPARED = 2
# Largest number of multiplications in the encoder's product of a recorded step: above it the GPU is slower than the host.
MOST_MULTIPLICATIONS = 2**39


class StepGraph:
    """Computes the gradients of a learner's steps by a CUDA graph, where that is possible and pays, and otherwise without.

    After some steps that differ in nothing but their rows and weights, a step is recorded. The first replays are compared with a step
    without the graph: if any value differs, a warning says so and the graph is not used.

    Args:
        learner: The learner that takes the steps.
        capture: How a step is recorded; the default is a CUDA graph.
    """

    def __init__(self, learner: Any, capture: Capture | None = None) -> None:
        self.learners, self._capture = [learner], capture or cuda_graph
        """The learner that takes the steps, and after it those that are read."""
        self._key: tuple[Any, ...] = ()
        self._equal_steps = self._compared = self._recordings = self._failures = 0
        self._recording: Recording | None = None
        self._is_off = False
        self.replayed = 0
        """Number of steps whose gradient the graph computed."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": (), "_recording": None, "replayed": 0}

    def gradients(self, x: Float[Tensor, "rows d_in"], compute: Compute, constants: tuple[Any, ...]) -> StepGradients:
        """The result of `compute(x)`, with the parameters' gradients.

        `constants` are the Python values that `compute` depends on: where they differ from those of the last step, nothing is replayed.
        """
        if self._is_off or not self._can_record(x):
            return compute(x)
        key = (*constants, *self._surroundings(x))
        if key != self._key:
            self._key, self._equal_steps, self._failures, self._recording = key, 0, 0, None
        self._equal_steps += 1
        if self._equal_steps <= STEPS_BEFORE * 2**self._recordings or not all(_has_cut(each) for each in self._sparse):
            return compute(x)
        if self._recording is None and not self._record(x, compute):
            return compute(x)
        assert self._recording is not None
        if self._compared < COMPARED:
            return self._compare(self._recording, x, compute)
        if not self._recording.replay(x):
            self._count_failure()
            return compute(x)
        self._failures, self.replayed = 0, self.replayed + 1
        return self._recording.outputs()

    def pays(self, n_rows: int) -> bool:
        """Whether a recording is expected to save time for so many rows."""
        return len(self._sparse) == len(self.learners) and n_rows * self.learners[0].sae.W_enc.numel() <= MOST_MULTIPLICATIONS

    def clear(self) -> None:
        """Free the recording and its memory."""
        self._key, self._recording = (), None

    @property
    def _sparse(self) -> list[SparseForward]:
        return [each.forward_pass for each in self.learners if isinstance(each.forward_pass, SparseForward)]

    def _can_record(self, x: Tensor) -> bool:
        """Whether steps on rows like `x` can be recorded, and that pays."""
        return triton_kernels(x) is not None and self.pays(len(x)) and self._sparse[0].has_static_shapes

    def _surroundings(self, x: Tensor) -> tuple[Any, ...]:
        """What a recording depends on beside the rows' values: shapes, data types, autocast, k, and where weights and buffers lie."""
        device = x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        tensors = [tensor for each in self.learners for tensor in (*each.parameters(), *each.buffers())]
        addresses = [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]
        return (x.shape, x.dtype, x.device, autocast, self._sparse[0].padded_dead, *(each.sae.cfg.k for each in self._sparse), *addresses)

    def _record(self, x: Tensor, compute: Compute) -> bool:
        """Record a step; returns whether that worked. If it did not, steps go on without a graph."""
        self._recordings, self._compared = self._recordings + 1, 0
        self._recording = record(x, compute, self._sparse, self._capture)
        self._is_off = self._recording is None
        return not self._is_off

    def _count_failure(self) -> None:
        """Give a recording up whose replays keep failing. Another is made after more steps without it."""
        self._failures += 1
        if self._failures == FAILURES:
            self._key, self._recording = (), None

    def _compare(self, recording: Recording, x: Tensor, compute: Compute) -> StepGradients:
        """Compute a step without the graph and with it, and compare all results; those without it are returned."""
        sae, cuts = self.learners[0].sae, [each.last_cut for each in self._sparse]
        parameters, buffers = list(sae.parameters()), list(sae.buffers())
        before = [buffer.clone() for buffer in buffers]
        computed = compute(x)
        gradients, after, new_cuts = [p.grad for p in parameters], [b.clone() for b in buffers], [each.last_cut for each in self._sparse]
        self._restore(zip(buffers, before, strict=True), cuts)
        if recording.replay(x):
            self._compared += 1
            replayed = recording.outputs()
            pairs = [*zip((p.grad for p in parameters), gradients, strict=True), *zip(buffers, after, strict=True)]
            if not all(_are_equal(a, b) for a, b in [*pairs, *zip(_figures(replayed), _figures(computed), strict=True)]):
                self._is_off, self._recording = True, None
                warnings.warn("a step by CUDA graph differs from one without: steps go on without one, which takes longer", stacklevel=2)
        else:
            self._count_failure()
        self._restore(zip(buffers, after, strict=True), new_cuts)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return computed

    def _restore(self, buffers: Any, cuts: list[float | Tensor | None]) -> None:
        for buffer, value in buffers:
            buffer.copy_(value)
        for each, cut in zip(self._sparse, cuts, strict=True):
            each.last_cut = cut


def _has_cut(forward_pass: SparseForward) -> bool:
    """Whether a search begins at a cut that is on the device, or needs none."""
    return forward_pass.is_per_row or isinstance(forward_pass.last_cut, Tensor)


def _figures(gradients: StepGradients) -> list[Tensor | None]:
    (result,), extra = gradients.results, gradients.extra
    codes = result.codes
    return [result.loss, *result.losses.values(), codes.rows, codes.latents, codes.values, extra.loss, *extra.values.values()]


def _are_equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same shape and values, NaN for NaN, or both are missing."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step as a CUDA graph with memory of its own; returns its replay."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The outer context restores the stream if the capture fails. Other threads may wait and allocate while this one records.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(), capture_error_mode="thread_local"),
        ):
            step()
    except RuntimeError:
        # Before torch 2.12 a capture that fails leaves the allocator in its state of capturing.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)  # pyright: ignore[reportPrivateUsage]
        raise
    return graph.replay

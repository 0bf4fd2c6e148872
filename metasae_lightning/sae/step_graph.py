"""The gradient of a learner's step as a CUDA graph: the host starts all of its kernels with one call.

A graph holds one course of a step: the search for the largest activations has enough candidates, and the dead latents fit the same padding
as before. Whether that was so is known when the graph has run. If it was not, nothing has changed, and the gradient is computed again
without the graph. The optimiser's step is not in the graph, so that optimisers and learning rate schedules work as they do without one.
"""

import copy
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.gpu.passes import triton_kernels
from metasae_lightning.sae.forward import ForwardPass, SparseForward
from metasae_lightning.sae.recording import Capture, Compute, Recording, StepGradients

# Number of equal steps before a recording. They compile kernels and find a cut. It doubles with each recording.
STEPS_BEFORE = 4
# Number of replays that are compared with a step without the graph.
COMPARED = 2
# Multiplications of the encoder's product above which a step is not recorded: the GPU is then slower than the host.
MOST_MULTIPLICATIONS = 2**39


class StepGraph:
    """Computes the gradients of a learner's steps by a CUDA graph, where that is possible and pays, and otherwise without.

    After some steps that differ in nothing but their rows and weights, a step is recorded. The first replays are compared with a step
    without the graph: if any value differs, a warning says so and the graph is not used.

    Args:
        forward_passes: Those of a step: the trained SAE's, and after it those of SAEs that are read.
        capture: How a step is recorded; the default is a CUDA graph.
    """

    def __init__(self, forward_passes: list[ForwardPass], capture: Capture | None = None) -> None:
        self.forward_passes, self._capture = forward_passes, capture or cuda_graph
        self._key: tuple[Any, ...] = ()
        self._equal_steps = self._compared = self._recordings = 0
        self._recording: Recording | None = None
        self._is_off = False
        self.replayed = 0
        """Number of steps whose gradient the graph computed."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "StepGraph":
        return StepGraph(copy.deepcopy(self.forward_passes, memo), self._capture)

    def gradients(self, x: Float[Tensor, "rows d_in"], compute: Compute, constants: tuple[Any, ...]) -> StepGradients:
        """The result of `compute(x)`, with the parameters' gradients.

        `constants` are the Python values that `compute` depends on: where they differ from those of the last step, nothing is replayed.
        """
        if self._is_off or not self._can_record(x):
            return compute(x)
        key = (*constants, *self._surroundings(x))
        if key != self._key:
            self._key, self._equal_steps, self._recording = key, 0, None
        self._equal_steps += 1
        if self._equal_steps <= STEPS_BEFORE * 2**self._recordings or not all(_has_cut(each) for each in self._sparse):
            return compute(x)
        if self._recording is None and not self._record(x, compute):
            return compute(x)
        assert self._recording is not None
        if self._compared < COMPARED:
            return self._compare(self._recording, x, compute)
        if not self._recording.replay(x):
            return compute(x)
        self.replayed += 1
        return self._recording.outputs()

    def pays(self, n_rows: int) -> bool:
        """Whether a step on so many rows takes the host longer than the GPU, as far as that is known."""
        return n_rows * self.forward_passes[0].sae.W_enc.numel() <= MOST_MULTIPLICATIONS

    def clear(self) -> None:
        """Free the recording and its memory."""
        self._key, self._recording = (), None

    @property
    def _sparse(self) -> list[SparseForward]:
        return [each for each in self.forward_passes if isinstance(each, SparseForward)]

    def _can_record(self, x: Tensor) -> bool:
        """Whether steps on rows like `x` can be recorded, and that pays."""
        return triton_kernels(x) is not None and len(self._sparse) == len(self.forward_passes) and self.pays(len(x))

    def _surroundings(self, x: Tensor) -> tuple[Any, ...]:
        """What a recording depends on beside the rows' values: shapes, data types, autocast, and where weights and buffers lie."""
        device = x.device.type
        tensors = [tensor for each in self._sparse for tensor in (*each.sae.parameters(), *each.sae.buffers())]
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        padded_dead = self._sparse[0].padded_dead
        return (x.shape, x.dtype, x.device, autocast, padded_dead, *(tensor.data_ptr() for tensor in tensors))

    def _record(self, x: Tensor, compute: Compute) -> bool:
        """Record a step; returns whether that worked. If it did not, a warning says so and steps go on without a graph."""
        self._recordings, self._compared = self._recordings + 1, 0
        try:
            self._recording = Recording(x, compute, self._sparse, self._capture)
        except RuntimeError as error:
            self._turn_off(f"a step cannot be recorded as a CUDA graph ({' '.join(str(error).split())[:200]})")
        for parameter in self.forward_passes[0].sae.parameters():
            parameter.grad = None
        return self._recording is not None

    def _compare(self, recording: Recording, x: Tensor, compute: Compute) -> StepGradients:
        """Compute a step without the graph and with it, and compare all results; those without it are returned."""
        sae, cuts = self.forward_passes[0].sae, [each.last_cut for each in self._sparse]
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
                self._turn_off("a step by CUDA graph differs from one without")
        self._restore(zip(buffers, after, strict=True), new_cuts)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return computed

    def _restore(self, buffers: Any, cuts: list[float | Tensor | None]) -> None:
        for buffer, value in buffers:
            buffer.copy_(value)
        for each, cut in zip(self._sparse, cuts, strict=True):
            each.last_cut = cut

    def _turn_off(self, reason: str) -> None:
        self._is_off, self._recording = True, None
        warnings.warn(f"{reason}: steps go on without one, which takes longer", stacklevel=2)


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
    """Record a step as a CUDA graph; returns its replay. All graphs of a device share their memory, because their replays take turns."""
    return _captured(step, pool=_first_graph(torch.cuda.current_device()).pool()).replay


@cache
def _first_graph(device: int) -> torch.cuda.CUDAGraph:
    """A graph that keeps the memory of a device's graphs: torch cannot record into a pool whose graphs are all gone."""
    return _captured(lambda: torch.zeros(1, device=f"cuda:{device}"), pool=None)


def _captured(step: Callable[[], Any], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the stream if the capture fails. Other threads may wait and allocate while this one records.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        step()
    return graph

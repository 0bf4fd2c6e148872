"""A step's gradient that is recorded once and replayed for other rows."""

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from metasae_lightning.compute.gpu.host_reads import Then, deferred_checks, read_numbers
from metasae_lightning.sae.forward import SparseForward
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.step import Codes, ExtraTerm

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""A function that records what another function does on the GPU. It returns a function that does the same again."""


@dataclass(frozen=True)
class StepGradients:
    """What the backward passes of a step return, beside the parameters' gradients."""

    results: list[ForwardResult]
    """The forward pass of each micro-batch."""
    extra: ExtraTerm = field(default_factory=ExtraTerm)
    """The loss that is added to that of the rows."""


Compute = Callable[[Float[Tensor, "rows d_in"]], StepGradients]
"""Computes the gradients of a step on some rows, in one micro-batch."""


class Recording:
    """A step's gradient, recorded once and replayed for other rows.

    Args:
        x: The rows of the recorded step.
        compute: Computes the gradient.
        forward_passes: Those that `compute` runs: the trained SAE's, and after it those of SAEs that are read.
        capture: How the step is recorded.
        finish: Further work of the step, also recorded; its second argument tells, on the device, whether a check failed.
    """

    def __init__(
        self,
        x: Tensor,
        compute: Compute,
        forward_passes: Sequence[SparseForward],
        capture: Capture,
        finish: Callable[[StepGradients, Tensor], None] | None = None,
    ) -> None:
        self._compute, self._finish, self._sae = compute, finish, forward_passes[0].sae
        self._x, self._copied = x.clone(), (weakref.ref(x), x._version)
        self._hints = [(each, each.last_cut.clone()) for each in forward_passes if isinstance(each.last_cut, Tensor)]
        for each, hint in self._hints:
            each.cut_factor.store_on_device(hint)
        self._replays = 0
        cuts = [each.last_cut for each in forward_passes]
        try:
            self._replay = capture(self._step)
        finally:
            for each, cut in zip(forward_passes, cuts, strict=True):
                each.last_cut = cut

    def _step(self) -> None:
        """The step that is recorded."""
        torch.clear_autocast_cache()  # a weight that was cast inside the graph must not be reused outside it, or the reverse
        self._buffers = [(buffer, buffer.clone()) for buffer in self._sae.buffers()]
        for parameter in self._sae.parameters():
            parameter.grad = None
        for each, hint in self._hints:
            each.last_cut = hint
        with deferred_checks() as checks:
            self._gradients = self._compute(self._x)
        taken = checks.take()
        self._checks: list[tuple[int, Then | None]] = [(len(numbers), then) for numbers, then in taken]
        self._numbers = torch.cat([number for numbers, _ in taken for number in numbers])
        for each, hint in self._hints:
            assert isinstance(each.last_cut, Tensor)
            hint.copy_(each.last_cut)
        (result,), extra = self._gradients.results, self._gradients.extra
        # One copy of one tensor then gives all figures of a replay.
        figures = [result.loss, *result.losses.values(), *([] if extra.loss is None else [extra.loss]), *extra.values.values()]
        self._figures = torch.cat([figure.detach().reshape(1) for figure in figures])
        self._parameter_gradients = [(parameter, parameter.grad) for parameter in self._sae.parameters()]
        if self._finish is not None:
            self._finish(self._gradients, ~(self._numbers > 0).all())
        torch.clear_autocast_cache()

    def replay(self, x: Float[Tensor, "rows d_in"]) -> bool:
        """Compute the gradient of some rows; returns whether all checks held. Where one failed, the SAE's buffers are as before."""
        rows, version = self._copied
        if rows() is not x or version != x._version:
            self._x.copy_(x)
            self._copied = (weakref.ref(x), x._version)
        for each, hint in self._hints:
            if each.last_cut is not hint:
                assert isinstance(each.last_cut, Tensor)
                hint.copy_(each.last_cut)
                each.last_cut = hint
        self._replays += 1
        self._replay()
        numbers = read_numbers(self._numbers)
        remaining = iter(numbers)
        for count, then in self._checks:
            values = [next(remaining) for _ in range(count)]
            if then is not None:
                then(*values)
        if all(number > 0 for number in numbers):
            for parameter, gradient in self._parameter_gradients:
                parameter.grad = gradient
            return True
        for parameter, _ in self._parameter_gradients:
            parameter.grad = None  # an optimiser that keeps gradients has kept the recording's, which this replay has overwritten
        for buffer, before in self._buffers:
            buffer.copy_(before)
        for each, _ in self._hints:
            each.last_cut = None
        return False

    def outputs(self) -> StepGradients:
        """What the last replay computed. Figures and codes are copies; the reconstruction must be read before the next replay.

        A result that is kept keeps the memory of the recording.
        """
        (result,), extra, number = self._gradients.results, self._gradients.extra, self._replays
        figures = iter(self._figures.clone().unbind())
        loss, losses = next(figures), {name: next(figures) for name in result.losses}
        extra_loss = None if extra.loss is None else next(figures)
        codes = Codes(result.codes.rows.clone(), result.codes.latents.clone(), result.codes.values.clone(), result.codes.shape)

        def rebuild() -> Tensor:
            if self._replays != number:
                raise RuntimeError("the reconstruction was overwritten by a later step: read it within its step, or set cuda_graph: false")
            return result.rebuild()

        return StepGradients(
            [ForwardResult(loss, losses, codes, rebuild)], ExtraTerm(extra_loss, {name: next(figures) for name in extra.values})
        )


def record(
    x: Float[Tensor, "rows d_in"],
    compute: Compute,
    forward_passes: Sequence[SparseForward],
    capture: Capture,
    finish: Callable[[StepGradients, Tensor], None] | None = None,
) -> Recording | None:
    """A recording with these arguments; None, with a warning, where a step cannot be recorded."""
    try:
        return Recording(x, compute, forward_passes, capture, finish)
    except RuntimeError as error:  # too little memory is one
        reason = " ".join(str(error.__context__ or error).split())[:200]
        warnings.warn(f"a step cannot be recorded as a CUDA graph ({reason}): steps go on without one, which takes longer", stacklevel=3)
        return None
    finally:
        for parameter in forward_passes[0].sae.parameters():
            parameter.grad = None

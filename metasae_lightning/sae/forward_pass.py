"""The interface of the forward passes of an SAE in training."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Bool, Float
from sae_lens.saes.sae import TrainCoefficientConfig
from torch import Tensor

from metasae_lightning.architectures import Units
from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.sae.forward_result import ForwardResult
from metasae_lightning.sae.pretrained import AnySAE
from metasae_lightning.schedules import warm_up
from metasae_lightning.step import Codes

Kernels = Literal["sparse", "dense"]
BatchCut = Literal["global", "local"]
"""Whether a batch top-k SAE ranks the activations of all ranks' batches together (`global`) or of each rank's batch (`local`)."""
Keep = Callable[[Codes], Bool[Tensor, " nnz"]]
"""Which of the nonzeros of codes take part in a reconstruction."""


class ForwardPass(ABC):
    """The forward passes of one SAE in its normalised space: `train` with a loss, `read` without loss and gradient."""

    def __init__(self, sae: AnySAE) -> None:
        self.sae: Any = sae
        self.units = Units.of(sae.cfg)
        self.cached_support: tuple[Tensor, Tensor] | None = None
        """Row and latent indices of the nonzeros that `read` with `reuse_support` keeps."""
        self.parallelism = Parallelism()
        """The ranks whose batches are ranked together, and those that have the other latents."""

    @abstractmethod
    def join(self, parallelism: Parallelism, cut: BatchCut) -> None:
        """Train together with other ranks, each of which has part of the batch or part of the latents."""

    @abstractmethod
    def check_divisible(self) -> None:
        """Raise where the forward pass cannot work on a shard of the latents."""

    @abstractmethod
    def train(self, z: Float[Tensor, "row d_in"], *, dead: Bool[Tensor, " d_sae"], step: int, fresh_gradients: bool) -> ForwardResult:
        """The loss on these rows; the architecture's running statistics are updated.

        `fresh_gradients`: no earlier gradient is in use, so the backward pass may write the gradients into buffers of earlier steps.
        """

    @abstractmethod
    def read(
        self, z: Float[Tensor, "row d_in"], *, reuse_support: bool = False, reuse_output: bool = False, keep: Keep | None = None
    ) -> tuple[Codes, Float[Tensor, "row d_in"]]:
        """Codes of units and reconstruction by the training rule; no statistic is updated.

        `reuse_support`: keep the active latents of the previous such call instead of running top-k. `reuse_output`: return a buffer
        that all SAEs of the process share, valid until the next such call of any of them. `keep`: reconstruct from those of the codes
        for which it is true.
        """


def coefficients_at(sae: Any, step: int) -> dict[str, float]:
    """The coefficients of the SAE's losses at a step, warmed up as SAELens's trainer does."""
    coefficients: dict[str, float] = {}
    for name, coefficient in sae.get_coefficients().items():
        value, steps = coefficient if isinstance(coefficient, TrainCoefficientConfig) else (coefficient, 0)
        coefficients[name] = value * warm_up(step, steps)
    return coefficients

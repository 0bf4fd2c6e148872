"""The interface of a penalty: a scalar function of the primary's decoder."""

from abc import ABC, abstractmethod
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from metasae_lightning.compute.process_group import Parallelism
from metasae_lightning.compute.sharding import full
from metasae_lightning.errors import InputError


@runtime_checkable
class Critic(Protocol):
    """The frozen meta SAE as a function from unit decoder rows to their reconstruction. It computes no gradient and changes no state."""

    def __call__(self, rows: Float[Tensor, "row d_in"], /, blocks: Int[Tensor, " row"] | None = None) -> Float[Tensor, "row d_in"]:
        """The reconstruction, which may lie in a buffer that the next call overwrites.

        With `blocks`, the block of each row, the reconstruction is by those meta latents alone that are active on rows of several blocks.
        """
        ...


class Penalty(nn.Module, ABC):
    """A scalar function of the primary's decoder that is added to the loss with a weight.

    `weight` is the weight in the paper, where the squared error is a mean over `d_in` and the batch. It rises linearly from 0 over the
    first `warm_up_steps` primary steps. With weight 0 a run is bit-equal to one without the penalty, and the value is still logged.
    """

    needs_critic: bool = False
    group_size: int = 1
    """Number of neighbouring decoder rows that the primary gates as one, a block. `Penalties` sets it."""
    uses_step: bool = True
    """Whether the value depends on more than the decoder and the critic, such as the step's number. If not, a CUDA graph may replay it."""

    def __init__(self, weight: float, warm_up_steps: int = 0) -> None:
        super().__init__()
        if weight < 0 or warm_up_steps < 0:
            raise InputError(f"{type(self).__name__}: weight and warm_up_steps must not be negative, got {weight} and {warm_up_steps}")
        self.weight = weight
        self.warm_up_steps = warm_up_steps

    def setup(self, trainer: Any) -> None:
        """Called once before training, for a penalty that needs more of the run than the decoder and the critic. Default: nothing."""

    @abstractmethod
    def forward(self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int) -> Float[Tensor, ""]:
        """The penalty's value at primary step `step` (from 0). A pure function of its arguments."""

    def rank_share(
        self, W_dec: Float[Tensor, "d_sae d_in"], critic: Critic | None, step: int, parallelism: Parallelism
    ) -> Float[Tensor, ""]:
        """This rank's share: the sum of the shares over ranks is the penalty, for values and for gradients.

        By default every rank computes the whole penalty and divides it by the number of ranks; override this to divide the work. `W_dec`
        may be a DTensor, of which this rank holds only its own rows.
        """
        value = self(full(W_dec), critic, step)
        return value if parallelism.world.is_single else value / parallelism.world.world_size

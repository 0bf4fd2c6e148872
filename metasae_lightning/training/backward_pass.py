"""The backward pass of a training step."""

from contextlib import nullcontext

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor


def run_backward(module: LightningModule, loss: Tensor) -> None:
    """Backward pass of a loss through Lightning's strategy and precision plugin; plain where the module has no trainer."""
    if module._trainer is None:  # in a notebook or a test  # pyright: ignore[reportPrivateUsage]
        return loss.backward()
    # DDP would sum gradients over ranks in every backward pass; the learner sums them once, before the step.
    strategy = module.trainer.strategy
    with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
        module.manual_backward(loss)

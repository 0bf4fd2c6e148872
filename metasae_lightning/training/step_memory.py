"""What training keeps on the device between steps: buffers, and steps that are recorded as CUDA graphs."""

from collections.abc import Iterator

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn

from metasae_lightning.compute.buffers import SHARED
from metasae_lightning.sae.learner import Learner
from metasae_lightning.training.arm_callbacks import EachArm

BACKWARD_HOOKS = ("on_before_backward", "on_after_backward")


def free(module: nn.Module) -> None:
    """Free the buffers that all SAEs of the process share, and the recorded steps of a module's SAEs."""
    SHARED.clear()
    for learner in _learners(module):
        if learner.step_graph is not None:
            learner.step_graph.clear()


def leave_out_graphs(module: nn.Module, trainer: Trainer) -> None:
    """Take steps without CUDA graphs where Lightning takes part in the backward pass: by a callback's hook, or by DDP."""
    callbacks: list[Callback] = []
    for callback in trainer.callbacks:  # pyright: ignore
        callbacks += next(iter(callback.copies.values())) if isinstance(callback, EachArm) else [callback]  # pyright: ignore
    has_hook = any(getattr(type(each), hook) is not getattr(Callback, hook) for each in callbacks for hook in BACKWARD_HOOKS)
    if has_hook or isinstance(trainer.strategy, ParallelStrategy):
        for learner in _learners(module):
            learner.step_graph = None


def _learners(module: nn.Module) -> Iterator[Learner]:
    return (each for each in module.modules() if isinstance(each, Learner))

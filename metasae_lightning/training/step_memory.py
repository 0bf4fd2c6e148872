"""What training keeps on the device between steps: buffers, and steps that are recorded as CUDA graphs."""

from collections.abc import Iterator

from lightning.pytorch import Callback, Trainer
from torch import nn

from metasae_lightning.compute.buffers import SHARED
from metasae_lightning.sae.learner import Learner

BACKWARD_HOOKS = ("on_before_backward", "on_after_backward")


def free(module: nn.Module) -> None:
    """Free the buffers that all SAEs of the process share, and the recorded steps of a module's SAEs."""
    SHARED.clear()
    for learner in _learners(module):
        if learner.step_graph is not None:
            learner.step_graph.clear()


def record_no_hooks(module: nn.Module, trainer: Trainer) -> None:
    """Take steps without CUDA graphs where a callback has a hook for the backward pass: a replay would not call it."""
    hooks = [getattr(type(callback), hook) is not getattr(Callback, hook) for callback in trainer.callbacks for hook in BACKWARD_HOOKS]  # pyright: ignore
    if any(hooks):
        for learner in _learners(module):
            learner.step_graph = None


def _learners(module: nn.Module) -> Iterator[Learner]:
    return (each for each in module.modules() if isinstance(each, Learner))

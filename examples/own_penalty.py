"""A penalty and a callback of your own, named in the overlay examples/own_penalty.yaml.

    python -m metasae_lightning.cli fit -c quickstart -c examples/own_penalty.yaml --run runs/own

Start it in the folder that holds examples/, so that Python finds the module `examples.own_penalty`.
"""

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from metasae_lightning.penalties import Penalty
from metasae_lightning.training.arm_callbacks import Observer


class SharedDirection(Penalty):
    """Penalise the direction that all decoder rows share: the squared length of their mean.

    Args:
        weight: Factor of the penalty in the loss.
        warm_up_steps: Steps over which the weight grows from 0.
    """

    def forward(self, W_dec: Tensor, critic: Any, step: int) -> Tensor:
        """The squared length of the mean decoder row."""
        return W_dec.mean(0).square().sum()


class PrintReconstruction(Observer):
    """Print the fraction of variance unexplained at regular steps; with several arms, a line for each.

    Args:
        every_steps: Steps between two lines.
    """

    def __init__(self, every_steps: int = 100) -> None:
        self.every_steps = every_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """`outputs["output"]` is the StepOutput of this step."""
        if batch_idx % self.every_steps == 0:
            step = outputs["output"]
            print(f"step {batch_idx}: fvu {step.primary.fvu:.3f}, shared direction {step.penalties['shared_direction']:.5f}", flush=True)

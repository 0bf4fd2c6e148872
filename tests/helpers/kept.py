"""What a run that goes on from a checkpoint begins with, kept in a file."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from metasae_lightning.compute.sharding import whole


class Kept(Callback):
    """Write all state and the optimisers' moments by name, whole, and end the run."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        found = {name: whole(tensor.detach()) for name, tensor in pl_module.state_dict().items()}
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                found |= {f"{names[parameter]} {key}": whole(value) for key, value in state.items()}
        if trainer.is_global_zero:
            torch.save(found, self.path)
        trainer.strategy.barrier()
        raise SystemExit(0)

"""A callback that saves the state with which a resumed run starts."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from metasae_lightning.compute.sharding import full


class SaveStartState(Callback):
    """Write all state and the optimisers' moments to a file, by name and unsharded, and end the run before its first step."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        state_by_name = {name: full(tensor.detach()) for name, tensor in pl_module.state_dict().items()}
        names = {parameter: name for name, parameter in pl_module.named_parameters()}
        for optimizer in trainer.optimizers:
            for parameter, state in optimizer.state.items():
                state_by_name |= {f"{names[parameter]} {key}": full(value) for key, value in state.items()}
        if trainer.is_global_zero:
            torch.save(state_by_name, self.path)
        trainer.strategy.barrier()
        raise SystemExit(0)

"""Checkpoint folders written by this process alone, and content that runs code when a pickle of it is loaded."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint

from metasae_lightning.training.checkpoint_folder import METADATA


class RunsCode:
    """Makes a folder when a pickle of it is loaded as any pickle."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def write_parts(folder: Path, state: dict[str, Any], content: Any = None) -> None:
    """Write the parts of a checkpoint folder, without its checksums: `state` as one rank's part, `content` as what is not sharded."""
    folder.mkdir(parents=True)
    with warnings.catch_warnings():  # torch warns that this is only one process
        warnings.simplefilter("ignore")
        checkpoint.save(state, storage_writer=checkpoint.FileSystemWriter(folder), no_dist=True)
    torch.save(content or {"epoch": 0}, folder / METADATA)

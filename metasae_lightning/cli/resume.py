"""The checkpoint that a command starts from."""

from pathlib import Path

from metasae_lightning.errors import InputError
from metasae_lightning.training.checkpoint_files import damage_error, find_damage


def check_checkpoint(checkpoint: str) -> None:
    """Reject a checkpoint, named by its path, that is missing, damaged or refused. Lightning's own names and addresses are left to it."""
    if checkpoint in ("last", "best", "hpc") or "://" in checkpoint:
        return
    if not Path(checkpoint).exists():
        raise InputError(f"--ckpt_path {checkpoint}: there is no such file")
    if damage := find_damage(Path(checkpoint)):
        raise damage_error(Path(checkpoint), damage)

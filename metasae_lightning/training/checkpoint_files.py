"""Checkpoint files: written atomically, verified after writing and before reading, found, and pruned.

A checkpoint of one process is a file. A checkpoint of several ranks under `Sharded` is a folder with a part from each rank.
"""

import contextlib
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from metasae_lightning.atomic_files import draft_of, remove
from metasae_lightning.errors import InputError, one_line
from metasae_lightning.training.checkpoint_folder import check_folder_types, find_folder_damage, load_plain, merge_parts

LAST = "last.ckpt"
"""Name of the link to the newest checkpoint."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files, with atomic writes: a file replaces an older one only after it was verified."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint, read it back, and let it replace an older one. After any failure the older one is still there.

        The older one may be a folder, written by several ranks. Paths with a scheme (`s3://`) go to Lightning's own writer.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            with draft_of(Path(path)) as draft:
                with draft.open("wb") as file:
                    torch.save(checkpoint, file)
                if damage := find_damage(draft):
                    raise OSError(f"what was written does not read back: it {damage}")
        # torch raises a RuntimeError on a full disk, and whatever pickling a callback's state raises.
        except Exception as error:
            raise write_error(Path(path), error) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint; a damaged or refused one is an error. A folder is merged into the checkpoint that one process would have
        written.

        A checkpoint is read as tensors and plain values whatever `weights_only` is: no code in it is run.
        """
        if "://" not in str(path) and (damage := find_damage(Path(path))):
            raise damage_error(Path(path), damage)
        return merge_parts(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, weights_only=True)


def write_error(path: Path, error: BaseException) -> InputError:
    """The error for a checkpoint that cannot be written, with the free disk space."""
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.exists() else 0.0
    return InputError(
        f"the checkpoint {path} cannot be written, and those before it are as they were "
        f"({' '.join(str(error).split())}; {free:,.0f} MiB are free there)"
    )


def damage_error(path: Path, damage: str) -> InputError:
    """The error for a damaged or refused checkpoint."""
    return InputError(f"the checkpoint {path} {damage}: name an earlier one; --ckpt_path last finds the newest whole one")


def find_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint file or folder, by its checksums, or why it is refused; None for an intact one.

    A checkpoint that holds other types than tensors and plain values is refused: reading it could run code.
    """
    if damage := find_folder_damage(path) if path.is_dir() else _find_file_damage(path):
        return f"is damaged ({damage})"
    return find_refusal(path)


def find_refusal(path: Path) -> str | None:
    """Describe why an undamaged checkpoint file or folder is refused; None for one of tensors and plain values."""
    try:
        check_folder_types(path) if path.is_dir() else load_plain(path)
    except pickle.UnpicklingError as error:
        name = re.search(r"(?:GLOBAL|names) ([\w.]+)", str(error))  # torch's words, or those of `plain_pickle`
        content = f"it names {name[1]}" if name else "it is made of something else"
        return f"was refused, and nothing in it was run ({content}: a checkpoint holds tensors and plain values alone)"
    except Exception as error:  # torch raises many types on a file that is no checkpoint
        return f"is damaged ({one_line(error)})"
    return None


def _find_file_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint file, by the checksums of a zip file; None for an intact one."""
    try:
        with zipfile.ZipFile(path) as file:
            bad_entry = file.testzip()
    except Exception as error:  # zipfile raises many types on damaged bytes
        return one_line(error)
    return None if bad_entry is None else f"its part {bad_entry} is not what was written"


def newest_intact(folders: Iterable[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint in some folders, or None, and what is wrong with each newer one."""
    modified: dict[Path, int] = {}
    for path in (path.resolve() for folder in folders for path in folder.glob("*.ckpt")):
        with contextlib.suppress(FileNotFoundError):  # a running process prunes old checkpoints
            modified[path] = path.stat().st_mtime_ns
    damaged: dict[Path, str] = {}
    for path in sorted(modified, key=lambda path: modified[path], reverse=True):
        if (damage := find_damage(path)) is None:
            return path, damaged
        damaged[path] = damage
    return None, damaged


def link_and_prune(path: Path, count: int) -> None:
    """Link `last.ckpt` to this checkpoint and keep the newest `count` checkpoints of its kind: those with the same name up to the `=`.

    Older ones of that kind, and drafts of killed processes, are deleted. Checkpoints of another kind stay.
    """
    for draft in path.parent.glob(".*.ckpt.*"):
        remove(draft)
    link = path.with_name(f".{LAST}.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name(LAST))
    kind = path.name.split("=")[0]
    same_kind = sorted(path.parent.glob(f"{kind}=*.ckpt"), key=lambda checkpoint: checkpoint.stat().st_mtime_ns, reverse=True)
    for old in same_kind[count:]:
        remove(old)


def last_checkpoint(run: Path) -> str:
    """The newest intact checkpoint of a run. Others are skipped, with a line on stderr for each; none at all is an error."""
    path, damaged = newest_intact([run / "checkpoints", run])
    for bad_path, damage in damaged.items():
        sys.stderr.write(f"metasae: the checkpoint {bad_path} {damage}: the one before it is tried\n")
    if path is None:
        raise InputError(f"--ckpt_path last: there is no {'whole' if damaged else 'last'} checkpoint in {run / 'checkpoints'}")
    return str(path)


def is_restarted_job(run: Path) -> bool:
    """Whether SLURM restarted this job and the run has an intact checkpoint.

    SLURM repeats the first start's command, which names no checkpoint.
    """
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 and newest_intact([run / "checkpoints", run])[0] is not None

"""Checkpoint files: written atomically, verified after writing and before reading, found, and pruned.

A checkpoint of one process is a file. A checkpoint of several ranks under `Sharded` is a folder with a part from each rank.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.distributed.checkpoint import filesystem, state_dict_loader
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from metasae_lightning.atomic_files import draft_of, remove
from metasae_lightning.errors import InputError

LAST = "last.ckpt"
"""Name of the link to the newest checkpoint."""
CHECKSUMS = "sums.json"
"""In a checkpoint folder: size and checksum of each part."""
METADATA = "meta.pt"
"""In a checkpoint folder: Lightning's file for everything that is not sharded."""
IDLE_OPTIMIZERS = "idle_optimizers"
"""Key in that file: parameter groups, by number, of optimisers without a step yet. Other optimisers' state is in the parts."""


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
                    raise OSError(f"what was written does not read back: {damage}")
        # torch raises a RuntimeError on a full disk, and whatever pickling a callback's state raises.
        except Exception as error:
            raise write_error(Path(path), error) from error

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint; a damaged one is an error. A folder is merged into the checkpoint that one process would have written."""
        if "://" not in str(path) and (damage := find_damage(Path(path))):
            raise damage_error(Path(path), damage)
        return merge_parts(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, *args, **kwargs)


def write_error(path: Path, error: BaseException) -> InputError:
    """The error for a checkpoint that cannot be written, with the free disk space."""
    free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.exists() else 0.0
    return InputError(
        f"the checkpoint {path} cannot be written, and those before it are as they were "
        f"({' '.join(str(error).split())}; {free:,.0f} MiB are free there)"
    )


def damage_error(path: Path, damage: str) -> InputError:
    """The error for a damaged checkpoint."""
    return InputError(f"the checkpoint {path} is damaged ({damage}): name an earlier one; --ckpt_path last finds the newest whole one")


def find_damage(path: Path) -> str | None:
    """Describe the damage of a checkpoint file or folder, by its checksums; None for an intact one."""
    if path.is_dir():
        return _find_folder_damage(path)
    try:
        with zipfile.ZipFile(path) as file:
            bad_entry = file.testzip()
    except Exception as error:  # zipfile raises many types on damaged bytes
        return " ".join(str(error).split()) or type(error).__name__
    return None if bad_entry is None else f"its part {bad_entry} is not what was written"


def newest_intact(folders: Iterable[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest intact checkpoint in some folders, or None, and the damage of each newer one."""
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
    """The newest intact checkpoint of a run. Damaged ones are skipped, with a line on stderr for each; none at all is an error."""
    path, damaged = newest_intact([run / "checkpoints", run])
    for bad_path, damage in damaged.items():
        sys.stderr.write(f"metasae: the checkpoint {bad_path} is damaged ({damage}): the one before it is tried\n")
    if path is None:
        raise InputError(f"--ckpt_path last: there is no {'whole' if damaged else 'last'} checkpoint in {run / 'checkpoints'}")
    return str(path)


def is_restarted_job(run: Path) -> bool:
    """Whether SLURM restarted this job and the run has an intact checkpoint.

    SLURM repeats the first start's command, which names no checkpoint.
    """
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 and newest_intact([run / "checkpoints", run])[0] is not None


def part_checksums(folder: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Size and checksum of the files that a rank wrote into a checkpoint folder; rank 0 also wrote the files that belong to no rank."""
    checksums: dict[str, tuple[int, int]] = {}
    for path in folder.iterdir():
        number = re.match(r"__(\d+)_", path.name)
        if (int(number[1]) if number else 0) == rank:
            checksums[path.name] = _size_and_checksum(path)
    return checksums


def write_checksums(folder: Path, checksums: dict[str, tuple[int, int]]) -> None:
    """Write the checksums of all parts into a checkpoint folder."""
    with (folder / CHECKSUMS).open("w") as file:
        json.dump(checksums, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def merge_parts(folder: Path) -> dict[str, Any]:
    """Merge a checkpoint folder into the checkpoint that one process would write.

    A folder keys optimiser state by parameter name, one process keys it by parameter number.
    """
    tensors = _read_parts(folder)
    checkpoint: dict[str, Any] = torch.load(folder / METADATA, weights_only=False, map_location="cpu")
    idle: dict[int, Any] = checkpoint.pop(IDLE_OPTIMIZERS, {})
    checkpoint["state_dict"], checkpoint["optimizer_states"] = tensors["state_dict"], []
    for number in range(len(tensors) - 1):
        optimizer = tensors[f"optimizer_{number}"]
        numbers = {name: index for index, name in enumerate(name for group in optimizer["param_groups"] for name in group["params"])}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in optimizer["param_groups"]]
        state = {numbers[name]: moments for name, moments in optimizer["state"].items()}
        checkpoint["optimizer_states"].append({"state": state, "param_groups": groups})
    for number in sorted(idle):
        checkpoint["optimizer_states"].insert(number, {"state": {}, "param_groups": idle[number]})
    return checkpoint


def _read_parts(folder: Path) -> dict[str, Any]:
    """Read all tensors of a checkpoint folder, unsharded, into memory, nested as they were saved."""
    reader = filesystem.FileSystemReader(folder)
    metadata = reader.read_metadata()
    flat = {
        name: torch.empty(item.size, dtype=item.properties.dtype) if isinstance(item, TensorStorageMetadata) else None
        for name, item in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():  # torch warns that this is only one process
        warnings.simplefilter("ignore")
        state_dict_loader.load(flat, storage_reader=reader, no_dist=True)
    return unflatten_state_dict(flat, metadata.planner_data)


def _find_folder_damage(folder: Path) -> str | None:
    """Describe the damage of a checkpoint folder; None for an intact one."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        bad_parts = [name for name, saved in checksums.items() if tuple(saved) != _size_and_checksum(folder / name)]
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return f"its part {bad_parts[0]} is not what was written" if bad_parts else None


def _size_and_checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file, and flush it to the disk."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
        os.fsync(file.fileno())
    return size, checksum

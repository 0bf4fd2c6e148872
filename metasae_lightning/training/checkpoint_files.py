"""Checkpoint files: there whole or not at all, and seen to be whole before anything is made of them."""

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

from metasae_lightning.atomic_files import remove, replace
from metasae_lightning.errors import InputError

LAST = "last.ckpt"
"""A link to the newest."""
CHECKSUMS = "sums.json"
"""In a folder of several ranks' parts, what each of them is."""
METADATA = "meta.pt"
"""There, what is not divided."""
IDLE_OPTIMIZERS = "idle_optimizers"
"""In that, the groups of those optimisers that have made no step, by number; the others are parts."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written beside their place and read back before they take it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Whatever fails, what had that name before is still there."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        draft = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if why := find_damage(draft):
                raise OSError(f"what was written does not read back: {why}")
            replace(draft, place)  # where ranks that divided a dictionary may have left a folder
        except Exception as error:  # torch's writer has its own words for a full disk; a callback may keep what no file holds
            raise write_error(place, error) from error
        finally:
            remove(draft)

    def load_checkpoint(self, path: Any, *given: Any, **named: Any) -> dict[str, Any]:
        """A file that is whole, or a folder of several ranks' parts as one."""
        if "://" not in str(path) and (why := find_damage(Path(path))):
            raise damage_error(Path(path), why)
        return merge_parts(Path(path)) if Path(path).is_dir() else super().load_checkpoint(path, *given, **named)


def write_error(place: Path, error: BaseException) -> InputError:
    """The one line of a checkpoint that cannot be written."""
    left = shutil.disk_usage(place.parent).free / 2**20 if place.parent.exists() else 0.0
    return InputError(
        f"the checkpoint {place} cannot be written, and those before it are as they were "
        f"({' '.join(str(error).split())}; {left:,.0f} MiB are free there)"
    )


def damage_error(path: Path, why: str) -> InputError:
    """The one line of a checkpoint that is not gone on with."""
    return InputError(f"the checkpoint {path} is damaged ({why}): name an earlier one; --ckpt_path last finds the newest whole one")


def find_damage(path: Path) -> str | None:
    """What is wrong with a file that torch wrote, or a folder of them; nothing where each part has the checksum it was written with."""
    if path.is_dir():
        return _torn(path)
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except Exception as error:  # whatever a reader makes of bytes that mean something else now
        return " ".join(str(error).split()) or type(error).__name__
    return None if bad is None else f"its part {bad} is not what was written"


def newest_intact(folders: Iterable[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint in some folders, and what is wrong with those that are newer."""
    found: dict[Path, int] = {}
    for path in (path.resolve() for folder in folders for path in folder.glob("*.ckpt")):
        with contextlib.suppress(FileNotFoundError):  # a run that goes on removes what is too old
            found[path] = path.stat().st_mtime_ns
    broken: dict[Path, str] = {}
    for path in sorted(found, key=lambda path: found[path], reverse=True):
        if (why := find_damage(path)) is None:
            return path, broken
        broken[path] = why
    return None, broken


def link_and_prune(path: Path, count: int) -> None:
    """Point to a checkpoint as the last one, keep so many of its kind, and remove what a process left that ended while it wrote one."""
    for draft in path.parent.glob(".*.ckpt.*"):
        remove(draft)
    link = path.with_name(f".{LAST}.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name(LAST))
    kind = path.name.split("=")[0]
    mine = sorted(path.parent.glob(f"{kind}=*.ckpt"), key=lambda one: one.stat().st_mtime_ns, reverse=True)
    for old in mine[count:]:
        remove(old)


def last_checkpoint(run: Path) -> str:
    """The newest whole checkpoint of a run; a damaged one is passed over, and that is said."""
    path, broken = newest_intact([run / "checkpoints", run])
    for each, why in broken.items():
        sys.stderr.write(f"metasae: the checkpoint {each} is damaged ({why}): the one before it is tried\n")
    if path is None:
        raise InputError(f"--ckpt_path last: there is no {'whole' if broken else 'last'} checkpoint in {run / 'checkpoints'}")
    return str(path)


def is_restarted_job(run: Path) -> bool:
    """Whether a batch system has begun this job again, after one that left checkpoints: its command is the one that began the run."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0 and newest_intact([run / "checkpoints", run])[0] is not None


def part_checksums(folder: Path, rank: int) -> dict[str, tuple[int, int]]:
    """Size and checksum of what a rank wrote into a folder, the first one's with what it wrote for all."""
    found: dict[str, tuple[int, int]] = {}
    for path in folder.iterdir():
        number = re.match(r"__(\d+)_", path.name)
        if (int(number[1]) if number else 0) == rank:
            found[path.name] = _sum(path)
    return found


def write_checksums(folder: Path, written: dict[str, tuple[int, int]]) -> None:
    """Keep what a folder's parts are, so that it is seen whether they still are."""
    with (folder / CHECKSUMS).open("w") as file:
        json.dump(written, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def merge_parts(folder: Path) -> dict[str, Any]:
    """A folder of several ranks' parts as the checkpoint that one process writes: optimisers' state by number in place of name."""
    found = _read(folder)
    checkpoint: dict[str, Any] = torch.load(folder / METADATA, weights_only=False, map_location="cpu")
    idle: dict[int, Any] = checkpoint.pop(IDLE_OPTIMIZERS, {})
    checkpoint["state_dict"], checkpoint["optimizer_states"] = found["state_dict"], []
    for number in range(len(found) - 1):
        kept = found[f"optimizer_{number}"]
        numbers = {name: at for at, name in enumerate(name for group in kept["param_groups"] for name in group["params"])}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in kept["param_groups"]]
        checkpoint["optimizer_states"].append(
            {"state": {numbers[name]: one for name, one in kept["state"].items()}, "param_groups": groups}
        )
    for number in sorted(idle):
        checkpoint["optimizer_states"].insert(number, {"state": {}, "param_groups": idle[number]})
    return checkpoint


def _read(folder: Path) -> dict[str, Any]:
    """All parts, whole, in memory, each under the path of keys that it was written with."""
    reader = filesystem.FileSystemReader(folder)
    told = reader.read_metadata()
    flat = {
        name: torch.empty(kept.size, dtype=kept.properties.dtype) if isinstance(kept, TensorStorageMetadata) else None
        for name, kept in told.state_dict_metadata.items()
    }
    with warnings.catch_warnings():  # that this is one process is meant
        warnings.simplefilter("ignore")
        state_dict_loader.load(flat, storage_reader=reader, no_dist=True)
    return unflatten_state_dict(flat, told.planner_data)


def _torn(folder: Path) -> str | None:
    try:
        written = json.loads((folder / CHECKSUMS).read_text())
        bad = [name for name, kept in written.items() if tuple(kept) != _sum(folder / name)]
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return f"its part {bad[0]} is not what was written" if bad else None


def _sum(path: Path) -> tuple[int, int]:
    total, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            total, size = zlib.crc32(block, total), size + len(block)
        os.fsync(file.fileno())
    return size, total

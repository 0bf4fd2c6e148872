"""Checkpoint folders: a part from each rank and a file for everything that is not sharded, read without running code."""

import io
import json
import os
import pickle
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, state_dict_loader
from torch.distributed.checkpoint._nested_dict import unflatten_state_dict
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from metasae_lightning import plain_pickle
from metasae_lightning.errors import one_line

CHECKSUMS = "sums.json"
"""Size and checksum of each part."""
METADATA = "meta.pt"
"""Lightning's file for everything that is not sharded."""
IDLE_OPTIMIZERS = "idle_optimizers"
"""Key in that file: parameter groups, by number, of optimisers without a step yet. Other optimisers' state is in the parts."""
PART_TYPES = {
    *((f"torch.distributed.checkpoint.{module}", name) for module, name in (
        ("metadata", "Metadata"), ("metadata", "MetadataIndex"), ("metadata", "StorageMeta"), ("metadata", "TensorProperties"),
        ("metadata", "TensorStorageMetadata"), ("metadata", "BytesStorageMetadata"), ("metadata", "ChunkStorageMetadata"),
        ("metadata", "_MEM_FORMAT_ENCODING"), ("filesystem", "_StorageInfo"),
    )),
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}  # fmt: skip
"""The types in torch's list of a folder's parts."""


class PartReader(filesystem.FileSystemReader):
    """Torch's reader of a checkpoint folder, whose list of the parts, a pickle, may hold `PART_TYPES` alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Torch's list of the parts and the tensors in them."""
        metadata: Metadata = plain_pickle.loads((Path(self.path) / ".metadata").read_bytes(), PART_TYPES)
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class PartPlanner(DefaultLoadPlanner):
    """Torch's planner, which loads values that are no tensors as tensors and plain values alone."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Set a value that is no tensor."""
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], torch.load(value, weights_only=True))


def load_parts(state: dict[str, Any], folder: Path, **options: Any) -> None:
    """Load the parts of a checkpoint folder into the tensors and in place of the values of `state`."""
    state_dict_loader.load(state, storage_reader=PartReader(folder), planner=PartPlanner(), **options)


def load_plain(file: Any) -> dict[str, Any]:
    """The content of a checkpoint file on the CPU, its tensors mapped into memory; other types than torch allows are an error."""
    return torch.load(file, mmap=True, map_location="cpu", weights_only=True)


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
    checkpoint = load_plain(folder / METADATA)
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


def find_folder_damage(folder: Path) -> str | None:
    """Describe the damage of a checkpoint folder, by its checksums; None for an intact one."""
    try:
        checksums = json.loads((folder / CHECKSUMS).read_text())
        bad_parts = [name for name, saved in checksums.items() if tuple(saved) != _size_and_checksum(folder / name)]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return one_line(error)
    return f"its part {bad_parts[0]} is not what was written" if bad_parts else None


def check_folder_types(folder: Path) -> None:
    """Raise a `pickle.UnpicklingError` if a checkpoint folder holds anything but tensors, plain values and torch's list of the parts."""
    load_plain(folder / METADATA)
    metadata = PartReader(folder).read_metadata()
    values = [name for name, item in metadata.state_dict_metadata.items() if isinstance(item, BytesStorageMetadata)]
    state: dict[str, Any] = dict.fromkeys(values)
    try:
        _load_alone(state, folder)
    except CheckpointException as error:
        raise pickle.UnpicklingError(str(next(iter(error.failures.values()))[0])) from error


def _read_parts(folder: Path) -> dict[str, Any]:
    """Read all tensors of a checkpoint folder, unsharded, into memory, nested as they were saved."""
    metadata = PartReader(folder).read_metadata()
    flat = {
        name: torch.empty(item.size, dtype=item.properties.dtype) if isinstance(item, TensorStorageMetadata) else None
        for name, item in metadata.state_dict_metadata.items()
    }
    _load_alone(flat, folder)
    return unflatten_state_dict(flat, metadata.planner_data)


def _load_alone(state: dict[str, Any], folder: Path) -> None:
    """Load the parts of a checkpoint folder in this process alone."""
    with warnings.catch_warnings():  # torch warns that this is only one process
        warnings.simplefilter("ignore")
        load_parts(state, folder, no_dist=True)


def _size_and_checksum(path: Path) -> tuple[int, int]:
    """Size and CRC-32 of a file, and flush it to the disk."""
    checksum, size = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum, size = zlib.crc32(block, checksum), size + len(block)
        os.fsync(file.fileno())
    return size, checksum

"""Cached results of an evaluation. A stopped evaluation continues after its last complete entry."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from metasae_lightning.atomic_files import draft_of
from metasae_lightning.errors import InputError

Entry = dict[str, Tensor]


class ResultCache:
    """Cached tensors in a folder, one safetensors file per entry, keyed by name and a hash of all inputs."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, name: str, key: Mapping[str, Any]) -> Path:
        """File of an entry."""
        return self.folder / f"{name}-{hash_settings(key)}.safetensors"

    def has(self, name: str, key: Mapping[str, Any]) -> bool:
        """Whether an entry is cached."""
        return self.path(name, key).exists()

    def get(self, name: str, key: Mapping[str, Any]) -> Entry:
        """The entry of this name and key, which must be cached (see `has`). A file that cannot be read is an `InputError`."""
        path = self.path(name, key)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: remove it, and it is measured again ({error})") from error

    def put(self, name: str, key: Mapping[str, Any], entry: Entry) -> None:
        """Write an entry; the file appears complete or not at all."""
        path = self.path(name, key)
        try:
            with draft_of(path) as draft:
                save_file({field: value.detach().cpu().contiguous() for field, value in entry.items()}, draft)
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot write {path}: {error}") from error

    def get_or_compute(self, name: str, key: Mapping[str, Any], compute: Callable[[], Entry]) -> Entry:
        """The cached entry; computed and written if it is missing."""
        if not self.has(name, key):
            self.put(name, key, compute())
        return self.get(name, key)


def hash_settings(settings: Mapping[str, Any]) -> str:
    """A short hash of JSON-like settings; the order of keys does not matter.

    >>> hash_settings({"a": 1, "b": 2}) == hash_settings({"b": 2, "a": 1}), hash_settings({"a": 1}) == hash_settings({"a": 2})
    (True, False)
    """
    return hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of the names of tensors and their values in float32; shapes and dtypes have no part in it."""
    hasher = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        hasher.update(name.encode())
        hasher.update(tensors[name].detach().cpu().contiguous().float().numpy().tobytes())
    return hasher.hexdigest()

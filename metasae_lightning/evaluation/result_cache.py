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

    def path(self, name: str, identity: Mapping[str, Any]) -> Path:
        """File of an entry."""
        return self.folder / f"{name}-{hash_settings(identity)}.safetensors"

    def has(self, name: str, identity: Mapping[str, Any]) -> bool:
        """Whether an entry is cached."""
        return self.path(name, identity).exists()

    def get(self, name: str, identity: Mapping[str, Any]) -> Entry:
        """Read an entry that is cached."""
        path = self.path(name, identity)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: remove it, and it is measured again ({error})") from error

    def put(self, name: str, identity: Mapping[str, Any], piece: Entry) -> None:
        """Write an entry; the file appears complete or not at all."""
        path = self.path(name, identity)
        try:
            with draft_of(path) as draft:
                save_file({key: value.detach().cpu().contiguous() for key, value in piece.items()}, draft)
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot write {path}: {error}") from error

    def get_or_compute(self, name: str, identity: Mapping[str, Any], make: Callable[[], Entry]) -> Entry:
        """The cached entry; computed and written if it is missing."""
        if not self.has(name, identity):
            self.put(name, identity, make())
        return self.get(name, identity)


def hash_settings(identity: Mapping[str, Any]) -> str:
    """A short hash of JSON-like settings; the order of keys does not matter.

    >>> hash_settings({"a": 1, "b": 2}) == hash_settings({"b": 2, "a": 1}), hash_settings({"a": 1}) == hash_settings({"a": 2})
    (True, False)
    """
    return hashlib.blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """A short hash of named tensors."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()

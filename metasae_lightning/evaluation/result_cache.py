"""What was measured, kept piece by piece: work that was stopped goes on behind its last whole piece."""

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

Piece = dict[str, Tensor]


class Ledger:
    """Pieces of work in a folder, a file each, by a name and by everything that the piece is a function of."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def path(self, name: str, identity: Mapping[str, Any]) -> Path:
        """Where a piece is, or will be."""
        return self.folder / f"{name}-{digest(identity)}.safetensors"

    def has(self, name: str, identity: Mapping[str, Any]) -> bool:
        """Whether a piece is there."""
        return self.path(name, identity).exists()

    def get(self, name: str, identity: Mapping[str, Any]) -> Piece:
        """A piece that is there."""
        path = self.path(name, identity)
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is damaged: remove it, and it is measured again ({error})") from error

    def keep(self, name: str, identity: Mapping[str, Any], piece: Piece) -> None:
        """Write a piece, whole or not at all."""
        path = self.path(name, identity)
        try:
            with draft_of(path) as draft:
                save_file({key: value.detach().cpu().contiguous() for key, value in piece.items()}, draft)
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot write {path}: {error}") from error

    def piece(self, name: str, identity: Mapping[str, Any], make: Callable[[], Piece]) -> Piece:
        """A piece from the folder, or else made and kept."""
        if not self.has(name, identity):
            self.keep(name, identity, make())
        return self.get(name, identity)


def digest(identity: Mapping[str, Any]) -> str:
    """A short name for what something is a function of.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest({"a": 1}) == digest({"a": 2})
    (True, False)
    """
    return hashlib.blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A short name for weights."""
    found = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().cpu().contiguous().float().numpy().tobytes())
    return found.hexdigest()

"""What is found out about a run, as JSON in its folder: read, added to, each file whole or not there."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metasae_lightning.errors import InputError


def read(path: Path) -> dict[str, Any]:
    """What a record holds; where there is none, nothing."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read, and would be written over: move it away ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} cannot be read: it holds no record")
    return found


def of_arm(record: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """An arm's part of a run's record, or all of it."""
    return (record.get("arms") or {}).get(arm) or {} if arm else dict(record)


def keep(path: Path, kind: str, entry: Mapping[str, Any], *, arm: str = "") -> None:
    """Add an entry to the run's record, or to an arm's part of it, without losing the others."""
    record = read(path)
    (record.setdefault("arms", {}).setdefault(arm, {}) if arm else record)[kind] = entry
    write(path, record)


def write(path: Path, entry: Any) -> None:
    """A record whole."""
    put(path, (json.dumps(finite(entry), indent=1) + "\n").encode())


def put(path: Path, content: bytes) -> None:
    """A file that is whole or not there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def finite(entry: Any) -> Any:
    """With null for what is no number: JSON has none.

    >>> finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(entry, Mapping):
        return {key: finite(value) for key, value in entry.items()}
    if isinstance(entry, list | tuple):
        return [finite(value) for value in entry]
    return None if isinstance(entry, float) and not math.isfinite(entry) else entry

"""The layout of a run's folder and its JSON records."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

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


def run_of(path: Path) -> Path | None:
    """The run that a folder is, or is an arm of."""
    if (path / "config.yaml").exists():
        return path
    resolved = path.resolve()
    return resolved.parents[1] if resolved.parent.name == "arms" and (resolved.parents[1] / "config.yaml").exists() else None


def config_of(path: Path) -> dict[str, Any]:
    """A recipe, or a run's config, as it is written."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} is no recipe")
    return tree


def model_in(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a config's model, of which several arms are one."""
    return (config.get("model") or {}).get("init_args") or {}


def arms_in(path: Path) -> list[str]:
    """The arms of a run that has several, in the order of its config, but for those that stopped before they had an SAE."""
    if not (path / "arms").is_dir() or not (path / "config.yaml").exists():
        return []
    names = model_in(config_of(path / "config.yaml")).get("arms")
    if not names:
        raise InputError(f"{path / 'config.yaml'} does not name the arms in {path / 'arms'}")
    return [name for name in names if (path / "arms" / name / "saes" / "primary" / "cfg.json").exists()]

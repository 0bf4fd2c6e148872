"""The layout of a run's folder: the paths in it, its config and its JSON records."""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from metasae_lightning import atomic_files
from metasae_lightning.errors import InputError


def config_file(run: Path) -> Path:
    """The path of a run's config."""
    return run / "config.yaml"


def record_file(run: Path) -> Path:
    """The path of a run's record: the results of training and evaluation, of all arms."""
    return run / "evaluation.json"


def lock_file(run: Path) -> Path:
    """The path of the lock file of a run that is being trained."""
    return run / ".fit.lock"


def arm_folder(run: Path, arm: str) -> Path:
    """The folder of one arm of a run with several arms."""
    return run / "arms" / arm


def exported_sae(folder: Path, role: str = "primary") -> Path:
    """The path of the SAELens folder that a run, or an arm, exports its `primary` or `meta` SAE to."""
    return folder / "saes" / role


def is_exported(folder: Path, role: str = "primary") -> bool:
    """Whether a run, or an arm, has exported this SAE."""
    return (exported_sae(folder, role) / "cfg.json").exists()


def exported_head(folder: Path) -> Path:
    """The path of the folder that a run, or an arm, saves the head on the primary's codes to."""
    return folder / "saes" / "head"


def find_run(path: Path) -> Path | None:
    """The run that a folder belongs to: the folder itself or, for an arm's folder, the run around it. None for any other folder."""
    if config_file(path).exists():
        return path
    resolved = path.resolve()
    if resolved.parent.name == "arms" and config_file(resolved.parents[1]).exists():
        return resolved.parents[1]
    return None


def read_config(path: Path) -> dict[str, Any]:
    """The content of a recipe or of a run's config, as YAML gives it; an `InputError` where it cannot be read or is no mapping."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a recipe: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path} is no recipe")
    return tree


def model_args(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a config's model; those of `SideBySide` hold the arms."""
    model = config.get("model")
    return (model.get("init_args") or {}) if isinstance(model, dict) else {}


def exported_arms(run: Path) -> list[str]:
    """The names of a run's arms in the order of its config, without arms that stopped before they exported an SAE.

    A run of one SAE has no arms: the list is empty. A folder `arms` without arms in the config is an `InputError`.
    """
    config = config_file(run)
    if not (run / "arms").is_dir() or not config.exists():
        return []
    names = model_args(read_config(config)).get("arms")
    if not names:
        raise InputError(f"{config} does not name the arms in {run / 'arms'}")
    return [name for name in names if is_exported(arm_folder(run, name))]


def read_record(path: Path) -> dict[str, Any]:
    """The content of a JSON record, or an empty dictionary where the file does not exist. A damaged file is an `InputError`."""
    try:
        record = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read, and would be written over: move it away ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{path} cannot be read: it holds no record")
    return record


def arm_record(record: Mapping[str, Any], arm: str) -> dict[str, Any]:
    """One arm's part of a run's record, empty where the record has no such arm; the whole record where `arm` is empty."""
    return (record.get("arms") or {}).get(arm) or {} if arm else dict(record)


def add_entry(path: Path, kind: str, entry: Mapping[str, Any], *, arm: str = "") -> None:
    """Set the entry named `kind` in a run's record, or in an arm's part of it. Other entries stay."""
    record = read_record(path)
    (record.setdefault("arms", {}).setdefault(arm, {}) if arm else record)[kind] = entry
    write_record(path, record)


def write_record(path: Path, record: Any) -> None:
    """Write a JSON record in place of an older one."""
    write_file(path, (json.dumps(null_non_finite(record), indent=1) + "\n").encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file of a run atomically; a failure is an `InputError`, and an older file stays."""
    try:
        atomic_files.write_bytes(path, content)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(folder: Path, option: str) -> None:
    """Reject a folder that cannot be made or written to; the `InputError` begins with `option`."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        # Permissions alone do not tell: root may write to every folder, but not make one in /proc.
        with tempfile.TemporaryDirectory(prefix=".metasae-", dir=nearest):
            pass
    except OSError as error:
        raise InputError(f"{option} {folder}: {nearest} is not a directory that can be written to") from error


def null_non_finite(tree: Any) -> Any:
    """Replace NaN and infinite numbers by None, because JSON cannot hold them.

    >>> null_non_finite({"a": [1.0, float("nan")]})
    {'a': [1.0, None]}
    """
    if isinstance(tree, Mapping):
        return {key: null_non_finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [null_non_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree

"""Checkpoint files: there whole or not at all, and seen to be whole before anything is made of them."""

import os
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from metasae_lightning.errors import InputError

LAST = "last.ckpt"
"""A link to the newest."""


class WholeFiles(TorchCheckpointIO):
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
            if why := damage(draft):
                raise OSError(f"what was written does not read back: {why}")
            draft.replace(place)
        except (OSError, RuntimeError) as error:  # torch's writer has words of its own for what a disk says
            left = shutil.disk_usage(place.parent).free / 2**20 if place.parent.exists() else 0.0
            raise InputError(
                f"the checkpoint {place} cannot be written, and those before it are as they were "
                f"({' '.join(str(error).split())}; {left:,.0f} MiB are free there)"
            ) from error
        finally:
            if place.parent.exists():
                draft.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, *given: Any, **named: Any) -> dict[str, Any]:
        """A file that is whole."""
        if "://" not in str(path) and (why := damage(Path(path))):
            raise InputError(f"the checkpoint {path} is damaged ({why}): name an earlier one; --ckpt_path last finds the newest whole one")
        return super().load_checkpoint(path, *given, **named)


def damage(path: Path) -> str | None:
    """What is wrong with a file that torch wrote; nothing where every part of it has the checksum that it was written with."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return " ".join(str(error).split())
    return None if bad is None else f"its part {bad} is not what was written"


def newest(folders: Iterable[Path]) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint in some folders, and what is wrong with those that are newer."""
    found = {path.resolve() for folder in folders for path in folder.glob("*.ckpt") if path.exists()}
    broken: dict[Path, str] = {}
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        if (why := damage(path)) is None:
            return path, broken
        broken[path] = why
    return None, broken


def keep(path: Path, count: int) -> None:
    """Point to a checkpoint as the last one, and keep so many of its kind."""
    link = path.with_name(f".{LAST}.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    link.replace(path.with_name(LAST))
    kind = path.name.split("=")[0]
    mine = sorted(path.parent.glob(f"{kind}=*.ckpt"), key=lambda one: one.stat().st_mtime_ns, reverse=True)
    for old in mine[count:]:
        old.unlink(missing_ok=True)

"""Files and folders that take a name all at once, in place of what had it before."""

import os
import shutil
from pathlib import Path


def put(draft: Path, place: Path) -> None:
    """Give a finished draft its name, through a loss of power too; where that fails, what had it before has it still."""
    old = place.with_name(f".{place.name}.old")
    remove(old)
    if draft.is_dir():
        settle(draft)
    stood = place.is_dir()
    if stood:  # a folder cannot be replaced at one stroke
        place.rename(old)
    try:
        draft.replace(place)
    except OSError:
        if stood:
            old.rename(place)
        raise
    settle(place.parent)
    remove(old)


def remove(path: Path) -> None:
    """A file, a link or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists() or path.is_symlink():  # where nothing is, a disk that may not be written to would complain
        path.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Have the names in a folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

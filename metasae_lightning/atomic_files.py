"""Files and folders that take a name all at once, in place of what had it before."""

import contextlib
import os
import shutil
from pathlib import Path


def put(draft: Path, place: Path) -> None:
    """Give a finished draft its name, so that a loss of power takes none of it; where that fails, what had the name before has it still.

    Only a file takes a name in one stroke. Where a folder is concerned there is a moment when neither has it.
    """
    old = place.with_name(f".{place.name}.old")
    remove(old)
    for part in [*draft.rglob("*"), draft]:
        settle(part)
    stood = place.is_dir() or (draft.is_dir() and (place.exists() or place.is_symlink()))
    if stood:
        place.rename(old)
    try:
        draft.replace(place)
    except OSError:
        if stood:
            old.rename(place)
        raise
    with contextlib.suppress(OSError):  # it has its name; some file systems cannot settle a folder
        settle(place.parent)
    remove(old)


def remove(path: Path) -> None:
    """A file, a link or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists() or path.is_symlink():  # where nothing is, a disk that may not be written to would complain
        path.unlink(missing_ok=True)


def settle(path: Path) -> None:
    """Have a file, or the names in a folder, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

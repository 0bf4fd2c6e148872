"""Atomic writes: a file or folder is written under a temporary name beside its path (the draft), then renamed to its path."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: after a failure the older file is still there, unchanged."""
    with draft_of(path) as draft:
        draft.write_bytes(content)


@contextlib.contextmanager
def draft_of(path: Path) -> Generator[Path, None, None]:
    """Give a draft path to write a file or a folder to. At the end of the block the draft replaces `path`; after an error it is removed.

    Parent folders of `path` are created.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(draft)  # of a process that had the same id and was killed
        yield draft
        replace(draft, path)
    finally:
        remove(draft)


def replace(draft: Path, path: Path) -> None:
    """Flush a finished draft to the disk, then rename it to `path`, so that a loss of power leaves the old or the new content.

    After an error `path` is unchanged. The rename of a file is one step. Where `path` or the draft is a folder there is a moment between
    two renames at which `path` does not exist.
    """
    old = path.with_name(f".{path.name}.old")
    remove(old)
    for item in [*draft.rglob("*"), draft]:
        fsync(item)
    move_away = path.is_dir() or (draft.is_dir() and (path.exists() or path.is_symlink()))
    if move_away:
        path.rename(old)
    try:
        draft.replace(path)
    except OSError:
        if move_away:
            old.rename(path)
        raise
    with contextlib.suppress(OSError):  # the rename is done; some file systems have no fsync for folders
        fsync(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with its content. A missing path is no error. Errors inside a folder are ignored."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists() or path.is_symlink():  # `unlink` of a missing file raises on a read-only file system
        path.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""A lock file, which one process at a time holds. The system frees the lock of a process that has ended, however it ended."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from metasae_lightning.errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


@contextlib.contextmanager
def file_lock(file: Path, name: str) -> Generator[None]:
    """Hold a lock file during a block; it names this process by id and host. One that another process holds is an `InputError`.

    A file that an ended process has left is taken over, with a line on stderr. Folders that are made for the file are removed with it if
    they are empty. Where the file system has no locks, nothing is locked.

    Args:
        file: The path of the lock file.
        name: What is locked, for messages.
    """
    made = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from error
    try:
        holder = _lock(handle, file, name)
        if holder:
            sys.stderr.write(f"metasae: {name}: the process {holder}, which held it, has ended: its lock is taken\n")
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _lock(handle: int, file: Path, name: str) -> str:
    """Lock an open file; returns the process that left it, or an empty string."""
    if fcntl is None:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"{name} is being written by the process {_holder(handle) or 'that has just begun'}: wait until it ends"
        ) from error
    except OSError:  # a file system without locks
        return ""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), file.stat()):
            return _holder(handle)
    raise InputError(f"{name} was being written by a process that has just ended: run the command again")


def _holder(handle: int) -> str:
    """The process that a lock file names, as text; an empty string where it names none."""
    try:
        content: Any = json.loads(os.pread(handle, 1000, 0))
        return f"{content['pid']:d} on {str(content['host'])[:100]!r}"
    except (ValueError, TypeError, KeyError):
        return ""

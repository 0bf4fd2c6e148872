"""Entries of result caches that a GPU still computes. Many are written at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from metasae_lightning.compute.transfers import wait_for_copies
from metasae_lightning.evaluation.result_cache import Entry, ResultCache

# Bytes of entries on a GPU above which the host waits for them and writes them.
MAX_BYTES = 2**29

Finish = Callable[[Entry], Entry]
"""Turns an entry on the CPU into the one that is written."""


@dataclass(frozen=True)
class _Pending:
    """An entry that is not written yet."""

    cache: ResultCache
    name: str
    key: Mapping[str, Any]
    entry: Entry
    finish: Finish


class PendingEntries:
    """Writes entries to result caches. Entries on a GPU are collected, so that the host waits once for many of them.

    An entry whose tensors are all on the CPU is written at once, with all collected entries. The end of the `with` block writes the rest,
    also after an interrupt from the keyboard, but not after another exception.

    Args:
        max_bytes: Bytes of collected entries on a GPU above which all are written.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self._pending: dict[Path, _Pending] = {}
        self._bytes = 0

    def __enter__(self) -> "PendingEntries":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, KeyboardInterrupt):
            self.write()

    def has(self, cache: ResultCache, name: str, key: Mapping[str, Any]) -> bool:
        """Whether an entry is written or collected."""
        return cache.has(name, key) or cache.path(name, key) in self._pending

    def put(self, cache: ResultCache, name: str, key: Mapping[str, Any], entry: Entry, finish: Finish = lambda entry: entry) -> None:
        """Write an entry, at once or later; `finish` is applied to it on the CPU."""
        self._pending[cache.path(name, key)] = _Pending(cache, name, key, entry, finish)
        on_device = [value for value in entry.values() if value.device.type != "cpu"]
        self._bytes += sum(value.nbytes for value in on_device)
        if not on_device or self._bytes > self.max_bytes:
            self.write()

    def write(self) -> None:
        """Copy all collected entries to the CPU and write them. The copies run side by side, and the host waits for the last."""
        pending, self._pending, self._bytes = list(self._pending.values()), {}, 0
        copies = [{field: value.to("cpu", non_blocking=True) for field, value in item.entry.items()} for item in pending]
        devices = {value.device for item in pending for value in item.entry.values() if value.device.type != "cpu"}
        for device in devices:
            wait_for_copies(device)
        for item, entry in zip(pending, copies, strict=True):
            item.cache.put(item.name, item.key, item.finish(entry))

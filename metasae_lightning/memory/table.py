"""Items of a memory plan by device, their peak, and whether it fits."""

from dataclasses import dataclass, replace
from typing import Literal

from rich.table import Table

from metasae_lightning.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class MemoryItem:
    """One item of a memory plan."""

    name: str
    """Its name."""
    device: str
    """Its device."""
    bytes: int
    """Bytes; for a temporary item, its peak."""
    explanation: str
    """Where the size comes from."""
    remedy: str = ""
    """Settings that make it smaller."""
    phase: str = ""
    """For a temporary item: what its blocks are rows of; blocks of one kind have one size. Empty for a permanent item."""
    small_bytes: int = 0
    """Bytes in small blocks, which malloc keeps when they are freed."""
    arms: Literal["", "each", "once"] = ""
    """How items of several arms combine: `each` adds up, `once` does not. By default permanent items add up, temporary ones do not."""

    def __add__(self, other: "MemoryItem") -> "MemoryItem":
        """Combine the same item of two arms.

        >>> (MemoryItem("a", "cpu", 100, "", phase="x") + MemoryItem("a", "cpu", 50, "", phase="x", small_bytes=50)).bytes
        150
        """
        if self.arms == "each" or not (self.arms or self.phase):
            return replace(self, bytes=self.bytes + other.bytes, small_bytes=self.small_bytes + other.small_bytes)
        small = max(self.small_bytes, other.small_bytes)
        return replace(self, bytes=max(self.bytes - self.small_bytes, other.bytes - other.small_bytes) + small, small_bytes=small)


@dataclass(frozen=True)
class MemoryPlan:
    """The memory plan of a run."""

    items: tuple[MemoryItem, ...]
    """Everything that takes memory."""
    unplanned: tuple[str, ...] = ()
    """Items that could not be planned, with reasons."""
    is_lower_bound: bool = False
    """Whether the run needs more than these items."""

    @property
    def devices(self) -> list[str]:
        """Devices with items."""
        return list(dict.fromkeys(item.device for item in self.items))

    def peak(self, device: str) -> int:
        """Peak bytes on a device: permanent items, the large blocks of one temporary item, and the small blocks of all phases.

        Temporary items take turns, so only the item with the most bytes in large blocks counts. Freed small blocks stay in the heap, where
        only blocks of the same size, those of the same phase, take their place. So small blocks add up over phases.

        >>> phases = (MemoryItem("a", "cpu", 50, "", phase="x", small_bytes=10), MemoryItem("b", "cpu", 30, "", phase="y", small_bytes=30))
        >>> MemoryPlan((MemoryItem("weights", "cpu", 100, ""), *phases)).peak("cpu")
        180
        """
        on_device = [item for item in self.items if item.device == device]
        temporary = [item for item in on_device if item.phase]
        heap = sum(max(item.small_bytes for item in temporary if item.phase == phase) for phase in {item.phase for item in temporary})
        largest = max((item.bytes - item.small_bytes for item in temporary), default=0)
        return sum(item.bytes for item in on_device if not item.phase) + heap + largest

    def fits(self, available: dict[str, int]) -> bool:
        """Whether the peak on every device is within its available bytes."""
        return all(self.peak(device) <= available[device] for device in self.devices)

    def check(self, available: dict[str, int]) -> None:
        """Raise an `InputError` if the run does not fit. It names the largest items with the settings that make them smaller."""
        for device in self.devices:
            if self.peak(device) <= available[device]:
                continue
            reducible = [item for item in self.items if item.device == device and item.remedy]
            largest = sorted(reducible, key=lambda item: -item.bytes)[:3]
            listed = "; ".join(f"{item.name} {item.bytes / GIB:.2f} ({item.remedy})" for item in largest)
            at_least = "at least " if self.is_lower_bound else ""
            raise InputError(
                f"memory: the run needs {at_least}{self.peak(device) / GIB:.2f} GiB on {device}, and {available[device] / GIB:.2f} are "
                f"available (--memory_gib sets the limit). Largest: {listed}"
            )

    def table(self, available: dict[str, int]) -> Table:
        """The plan as a table."""
        table = Table(title="memory that the run will need", title_justify="left", show_edge=False, pad_edge=False)
        table.add_column("")
        table.add_column("MiB", justify="right")
        table.add_column("", overflow="fold")
        for device in self.devices:
            for item in self.items:
                if item.device == device:
                    table.add_row(item.name, format_mib(item.bytes), item.explanation, style="dim" if item.phase else None)
            table.add_row(f"{device}, peak", format_mib(self.peak(device)), f"{format_mib(available[device])} available", style="bold")
        for reason in self.unplanned:
            table.add_row("not planned", "", reason)
        return table


def format_mib(size: int) -> str:
    """A number of bytes in MiB, as text.

    >>> format_mib(3 * 2**29)
    '1,536'
    """
    return f"{size / 2**20:,.0f}"

"""Items of a memory plan by device, their peak, and whether it fits."""

from dataclasses import dataclass, replace
from typing import Literal

from rich.table import Table

from metasae_lightning.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One item of a memory plan."""

    what: str
    """Its name."""
    device: str
    """Where it lies."""
    bytes: int
    """Bytes; for a temporary item, its peak."""
    how: str
    """Explanation of the size."""
    remedy: str = ""
    """Settings that make it smaller."""
    phase: str = ""
    """For a temporary item: what its blocks are rows of; blocks of one kind have one size."""
    small: int = 0
    """Bytes in small blocks, which malloc keeps when they are freed."""
    arms: Literal["", "each", "once"] = ""
    """How items of several arms combine; by default permanent items add up, and one temporary item exists at a time."""

    def __add__(self, other: "Line") -> "Line":
        """Combine the plans of two arms.

        >>> (Line("a", "cpu", 100, "", phase="x") + Line("a", "cpu", 50, "", phase="x", small=50)).bytes
        150
        """
        if self.arms == "each" or not (self.arms or self.phase):
            return replace(self, bytes=self.bytes + other.bytes, small=self.small + other.small)
        small = max(self.small, other.small)
        return replace(self, bytes=max(self.bytes - self.small, other.bytes - other.small) + small, small=small)


@dataclass(frozen=True)
class Plan:
    """The memory plan of a run."""

    lines: tuple[Line, ...]
    """Items."""
    unknown: tuple[str, ...] = ()
    """Items that could not be planned, with reasons."""
    is_lower_bound: bool = False
    """Whether the run needs more than these items."""

    @property
    def devices(self) -> list[str]:
        """Devices with items."""
        return list(dict.fromkeys(line.device for line in self.lines))

    def peak(self, device: str) -> int:
        """Peak bytes on a device: permanent items plus the largest phase.

        Phases take turns, so the largest of their large blocks counts. Small blocks stay in the heap; only blocks of the same size reuse
        their holes, so they add up over kinds of phases.

        >>> phases = (Line("a", "cpu", 50, "", phase="x", small=10), Line("b", "cpu", 30, "", phase="y", small=30))
        >>> Plan((Line("weights", "cpu", 100, ""), *phases)).peak("cpu")
        180
        """
        here = [line for line in self.lines if line.device == device]
        phases = [line for line in here if line.phase]
        heap = sum(max(line.small for line in phases if line.phase == kind) for kind in {line.phase for line in phases})
        large = max((line.bytes - line.small for line in phases), default=0)
        return sum(line.bytes for line in here if not line.phase) + heap + large

    def fits(self, free: dict[str, int]) -> bool:
        """Whether the peak on every device is within the free memory."""
        return all(self.peak(device) <= free[device] for device in self.devices)

    def check(self, free: dict[str, int]) -> None:
        """Refuse a run that does not fit, and say what to change."""
        for device in self.devices:
            if self.peak(device) <= free[device]:
                continue
            largest = sorted((line for line in self.lines if line.device == device and line.remedy), key=lambda line: -line.bytes)[:3]
            why = "; ".join(f"{line.what} {line.bytes / GIB:.2f} ({line.remedy})" for line in largest)
            need, had = self.peak(device) / GIB, free[device] / GIB
            raise InputError(
                f"memory: the run needs {'at least ' if self.is_lower_bound else ''}{need:.2f} GiB of {device} and may have {had:.2f}; "
                f"--memory_gib sets that. Largest: {why}"
            )

    def table(self, free: dict[str, int]) -> Table:
        """The plan as a table."""
        shown = Table(title="memory that the run will need", title_justify="left", show_edge=False, pad_edge=False)
        shown.add_column("")
        shown.add_column("MiB", justify="right")
        shown.add_column("", overflow="fold")
        for device in self.devices:
            for line in self.lines:
                if line.device == device:
                    shown.add_row(line.what, mib(line.bytes), line.how, style="dim" if line.phase else None)
            shown.add_row(f"{device}, at its height", mib(self.peak(device)), f"{mib(free[device])} may be had", style="bold")
        for line in self.unknown:
            shown.add_row("not known", "", line)
        return shown


def mib(size: int) -> str:
    """A size in MiB as text.

    >>> mib(3 * 2**29)
    '1,536'
    """
    return f"{size / 2**20:,.0f}"

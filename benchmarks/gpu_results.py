"""The rows of a GPU benchmark in a CSV file, the machine they were measured on, and the time that is left for them."""

import contextlib
import csv
import gc
import subprocess
import time
from collections.abc import Generator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

import torch

COLUMNS = ("section", "size", "arm", "figure", "value", "unit", "note")
# What each section measures with, and the name under which a package registry has it.
PACKAGES = {
    **{"jaxtyping": "jaxtyping", "jsonargparse": "jsonargparse", "lightning": "lightning"},
    **{"sae_lens": "sae-lens", "transformers": "transformers", "datasets": "datasets", "tokenizers": "tokenizers"},
    **{"triton": "triton", "sparsify": "eai-sparsify"},
}
# The share of the budget after which nothing new begins.
LATEST_START = 0.88


def package_version(package: str) -> str:
    """The version of an installed package, or an empty text."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def commit(folder: Path) -> str:
    """The commit of the tree that holds the folder, with `-dirty` after changes; empty without git."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine(device: torch.device) -> dict[str, str]:
    """Date, device, commit and the versions of the libraries: the last columns of every row."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {package: package_version(package) for package in ("triton", "sae-lens", "eai-sparsify")}
    return {"date": str(date.today()), "device": name, "torch": torch.__version__, **versions, "commit": commit(Path(__file__).parent)}


class Results:
    """The rows of a run, written to a CSV file one by one, so that a run that is stopped leaves the rows it has.

    Args:
        out: The CSV file.
        device: The device that is measured.
    """

    def __init__(self, out: Path, device: torch.device) -> None:
        self.device, self.machine = device, machine(device)
        self.failed = 0
        out.parent.mkdir(parents=True, exist_ok=True)
        self._file = out.open("w", newline="")
        self._table = csv.writer(self._file)
        self._table.writerow([*COLUMNS, *self.machine])

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, section: str, size: str, arm: str, figure: str, value: float | str, unit: str, note: str = "") -> None:
        """Write one row."""
        self._table.writerow([section, size, arm, figure, value, unit, note, *self.machine.values()])
        self._file.flush()

    def skip(self, section: str, size: str, arm: str, reason: str) -> None:
        """Write and print that an arm has no figures, and why."""
        self.add(section, size, arm, "skipped", "", "", reason)
        print(f"  {' '.join(filter(None, (size, arm)))}: {reason}", flush=True)

    @contextlib.contextmanager
    def attempt(self, section: str, size: str, arm: str) -> Generator[None, None, None]:
        """Run a block whose errors end this arm alone: a package that is missing, too little memory, or a failure, which is counted."""
        try:
            yield
        except ImportError as error:
            reason = f"skipped: {error}"
        except torch.OutOfMemoryError:
            reason = "does not fit in the device's memory"
        except Exception as error:  # the other arms are still worth the card's time
            self.failed += 1
            reason = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        else:
            return
        self.skip(section, size, arm, reason)
        free_memory(self.device)


class Budget:
    """The seconds of a whole run, divided among its sections; a section passes on what it does not use.

    Args:
        seconds: The seconds of the run, from the start of the script.
        shares: The share of each section, in their order.
    """

    def __init__(self, seconds: float, shares: dict[str, float]) -> None:
        self.start = time.perf_counter()
        total, passed = sum(shares.values()), 0.0
        self._latest: dict[str, float] = {}
        for section, share in shares.items():
            passed += share
            self._latest[section] = LATEST_START * seconds * passed / total

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def is_over(self, section: str) -> bool:
        """Whether nothing of that section may begin any more."""
        return self.elapsed >= self._latest[section]

    def reason(self, section: str) -> str:
        """Why a part of that section is skipped."""
        return f"skipped: its time was over at {self._latest[section]:.0f} s"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give the memory of freed tensors back to the GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with columns as wide as their longest cell; the first column is aligned to the left."""
    if not rows:
        return
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join((first, *others)), flush=True)

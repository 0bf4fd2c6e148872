"""What the benchmarks say of the machine and of their own process."""

import platform
import resource
from datetime import date
from pathlib import Path

import torch


def described() -> str:
    """Date, machine kind, threads and torch."""
    return f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peak_mib() -> float:
    """The most that this process held. The figure that getrusage gives begins with what the parent held when it forked."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def draw(path: Path, title: str, labels: list[str], values: list[float], unit: str) -> None:
    """A bar for each, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 + 0.32 * len(labels)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(labels, values, color="#4477aa")
    axes.bar_label(bars, [f"{value:,.3g}" for value in values], padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

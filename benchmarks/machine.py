"""Facts about the machine and the process, and the bar charts of the benchmarks."""

import platform
import resource
from datetime import date
from pathlib import Path

import torch


def machine_description() -> str:
    """Date, machine type, number of threads and version of torch."""
    return f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def peak_mib() -> float:
    """Peak resident size of this process in MiB. That of getrusage includes the parent's size at the fork, so /proc comes first."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def save_bar_chart(path: Path, title: str, labels: list[str], values: list[float], unit: str) -> None:
    """Write a chart with one bar for each value."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.5 + 0.32 * len(labels)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(labels, values, color="#4477aa")
    axes.bar_label(bars, [f"{value:,.3g}" for value in values], padding=3)
    axes.invert_yaxis()
    axes.set(title=title, xlabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)

"""Where the time of a step goes: kernels by group, launches and host waits a step, and the share of time in which the GPU is busy."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_arms import JOINT, MACRO, SIZES, Step, ours, ours_joint
from gpu_results import Budget, Results, print_table, synchronize
from gpu_steps import batches, milliseconds
from torch.profiler import ProfilerActivity, profile

STEPS = 3
# The group of a kernel is the first whose pattern its name contains.
GROUPS = {
    "copy to the host": r"Memcpy DtoH",
    "copy, fill": r"Memcpy|Memset|copy_kernel|CatArray|FillFunctor|direct_copy|aten::(copy_|fill_|zero_)",
    "optimiser": r"[Aa]dam|multi_tensor_apply",
    "selection, sort": r"[Tt]op[Kk]|[Rr]adix|[Ss]ort|kth|gatherKth|aten::(topk|sort|kthvalue)",
    "sparse product": r"cusparse|csrmm|spmm|sddmm|coo_|aten::_?sparse",
    "product": r"gemm|cutlass|nvjet|xmma|cublas|splitK|aten::(mm|addmm|bmm)",
    "index, scatter": r"index|scatter|gather|nonzero|flagged|embedding|unique|bincount|histogram",
    "reduction": r"reduce|[Ss]oftmax|norm|scan|cumsum|aten::(sum|mean|max|min)",
    "elementwise": r"elementwise|aten::",
}
WAITS = re.compile(r"^cuda(StreamSynchronize|EventSynchronize|Memcpy)$|aten::_local_scalar_dense")


@dataclass(frozen=True)
class Parts:
    """What a trace of several steps shows, for one step."""

    milliseconds: dict[str, float]
    """Time on the device by group."""
    names: dict[str, float]
    """Time on the device by kernel, shortened names."""
    kernels: float
    """Kernels, copies and fills on the device."""
    launches: float
    """Calls of the host that put kernels on the device; a graph's kernels come from one."""
    waits: float
    """Times that the host waited for the device."""


def group_of(name: str) -> str:
    """The group of a kernel; one that no pattern knows, such as a Triton kernel, is a group of its own."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name)), name.split("(")[0][:40])


def parts_of(events: Iterable[dict[str, Any]], steps: int) -> Parts:
    """The parts of a step in the events of torch's trace format; on a CPU, operators count as kernels."""
    events = [event for event in events if event.get("ph") == "X"]
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    host_calls = [str(event["name"]) for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    if not host_calls:
        operators = [event for event in events if event.get("cat") == "cpu_op" and str(event["name"]).startswith("aten::")]
        on_device, host_calls = operators, [str(event["name"]) for event in operators]
    groups, names = Counter[str](), Counter[str]()
    for event in on_device:
        groups[group_of(str(event["name"]))] += event["dur"] / 1000 / steps
        names[re.sub(r"^void |[<(].*", "", str(event["name"]))] += event["dur"] / 1000 / steps
    kernels = [event for event in on_device if event["cat"] in ("kernel", "cpu_op")]
    launches = len({event.get("args", {}).get("correlation", index) for index, event in enumerate(kernels)})
    waits = sum(1 for name in host_calls if WAITS.search(name))
    return Parts(dict(groups.most_common()), dict(names.most_common(5)), len(on_device) / steps, launches / steps, waits / steps)


def profiled(step: Step, inputs: list[Any], steps: int, device: torch.device) -> Parts:
    """Trace several steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        for index in range(steps):
            step(inputs[index % len(inputs)])
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return parts_of(json.loads(path.read_text())["traceEvents"], steps)


def report(results: Results, size: str, arm: str, parts: Parts, whole: float) -> None:
    """Write and print the parts of one arm; `whole` is its step in milliseconds, without the profiler."""
    busy = sum(parts.milliseconds.values())
    figures = {"kernels": parts.kernels, "launches": parts.launches, "host waits": parts.waits}
    for figure, value in figures.items():
        results.add("parts", size, arm, figure, round(value, 2), "a step")
    results.add("parts", size, arm, "step", round(whole, 4), "ms")
    results.add("parts", size, arm, "busy", round(busy / whole, 4), "share of the step")
    for group, milliseconds_of_group in parts.milliseconds.items():
        results.add("parts", size, arm, group, round(milliseconds_of_group, 5), "ms")
    for name, milliseconds_of_kernel in parts.names.items():
        results.add("parts", size, arm, f"kernel {name}", round(milliseconds_of_kernel, 5), "ms")
    counts = ", ".join(f"{value:.1f} {figure}" for figure, value in figures.items())
    rows = [[group, f"{value:.3f}", f"{value / busy:.0%}"] for group, value in parts.milliseconds.items()]
    print_table(f"parts, {size}, {arm}: {counts}, busy {busy / whole:.0%} of {whole:.2f} ms", ["kernels", "ms", "share"], rows)


def run(results: Results, budget: Budget, size: str) -> None:
    """Trace the solo and the joint step of one size; figures are for a primary step."""
    for subject, arm, steps in ((ours, "ours, solo", STEPS), (ours_joint, JOINT, MACRO)):
        if budget.is_over("parts"):
            results.skip("parts", size, arm, budget.reason("parts"))
            continue
        with results.attempt("parts", size, arm):
            step, inputs = subject(SIZES[size], results.device)[arm], batches(size, results.device, 4)
            milliseconds(step, inputs, steps, results.device)
            whole = milliseconds(step, inputs, steps, results.device)
            report(results, size, arm, profiled(step, inputs, steps, results.device), whole)

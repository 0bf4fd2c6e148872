"""Milliseconds and peak memory of a training step of every arm, in turn in one process."""

import statistics
import time

import torch
from gpu_arms import JOINT, JOINT_WITHOUT_GRAPH, MACRO, SIZES, SUBJECTS, Step
from gpu_results import Budget, Results, free_memory, print_table, synchronize
from torch import Tensor

WARM_UP, JOINT_RUNS = 2, 3
# Our first steps: a CUDA graph is recorded after some equal steps, of the primary, the critic and the meta SAE.
OUR_WARM_UP, MACRO_STEPS_BEFORE = 8, 3


JOINTS = (JOINT, JOINT_WITHOUT_GRAPH)


def batches(size: str, device: torch.device, count: int) -> list[Tensor]:
    """Batches of random activations on the device."""
    generator = torch.Generator().manual_seed(0)
    shape = (SIZES[size].tokens, SIZES[size].d_in)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(count)]


def milliseconds(step: Step, inputs: list[Tensor], count: int, device: torch.device) -> float:
    """The mean time of `count` steps, from an idle device to an idle device."""
    synchronize(device)
    start = time.perf_counter()
    for index in range(count):
        step(inputs[index % len(inputs)])
    synchronize(device)
    return (time.perf_counter() - start) / count * 1000


class Measured:
    """The arms of one size, with their times and peaks.

    Args:
        size: The name of the size.
        results: Where rows go.
    """

    def __init__(self, size: str, results: Results) -> None:
        self.size, self.results, self.device = size, results, results.device
        self.arms: dict[str, Step] = {}
        self.peaks: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}
        self.inputs = batches(size, self.device, 4)

    def build(self, budget: Budget) -> None:
        """Build all subjects and warm their arms up; an arm that is missing, late or too large is left out, with a row that says so."""
        for name, subject in SUBJECTS.items():
            if budget.is_over("step"):
                self.results.skip("step", self.size, name, budget.reason("step"))
                continue
            with self.results.attempt("step", self.size, name):
                before = self._allocated()
                for arm, step in subject(SIZES[self.size], self.device).items():
                    if "compiled" in arm and budget.is_over("step"):
                        self.results.skip("step", self.size, arm, budget.reason("step"))
                        continue
                    with self.results.attempt("step", self.size, arm):
                        self._warm_up(arm, step, before)

    def _warm_up(self, arm: str, step: Step, before: int) -> None:
        """Take an arm's first steps, which allocate and compile, and keep its peak over what was allocated before its subject was built."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        count = MACRO_STEPS_BEFORE * MACRO if arm in JOINTS else OUR_WARM_UP if arm.startswith("ours") else WARM_UP
        milliseconds(step, self.inputs, count, self.device)
        if self.device.type == "cuda":
            self.peaks[arm] = (torch.cuda.max_memory_allocated(self.device) - before) / 2**20
        self.arms[arm] = step

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def measure(self, runs: int) -> None:
        """Time all arms in turn, `runs` steps each; a joint arm takes a whole macro-step in a fifth of the rounds."""
        joint_runs = min(JOINT_RUNS, runs)
        for index in range(runs):
            for arm in list(self.arms):
                if arm in JOINTS and index % (runs // joint_runs):
                    continue
                with self.results.attempt("step", self.size, arm):
                    count = MACRO if arm in JOINTS else 1
                    self.times.setdefault(arm, []).append(milliseconds(self.arms[arm], self.inputs, count, self.device))
                    continue
                del self.arms[arm]

    def report(self) -> None:
        """Write and print the medians, the peaks, and the ratios to SAELens's and the dense step's best."""
        medians = {arm: statistics.median(times) for arm, times in self.times.items() if arm in self.arms}
        references = {
            reference: min((ms for arm, ms in medians.items() if arm.startswith(reference)), default=None)
            for reference in ("SAELens", "dense")
        }
        rows: list[list[str]] = []
        for arm, median in medians.items():
            spread = f"{min(self.times[arm]):.3f} to {max(self.times[arm]):.3f} over {len(self.times[arm])}"
            self.results.add("step", self.size, arm, "step", round(median, 4), "ms", spread)
            cells = [arm, f"{median:.3f}"]
            for reference, best in references.items():
                ratio = None if best is None else median / best
                if ratio is not None and arm.startswith("ours"):
                    self.results.add("step", self.size, arm, f"of {reference}'s best", round(ratio, 4), "ratio")
                cells.append("" if ratio is None else f"{ratio:.2f}")
            if arm in self.peaks:
                self.results.add("step", self.size, arm, "peak memory", round(self.peaks[arm], 1), "MiB")
            rows.append([*cells, f"{self.peaks[arm]:,.0f}" if arm in self.peaks else ""])
        size = SIZES[self.size]
        title = f"a step, {self.size}: d_in {size.d_in}, d_sae {size.d_sae}, {size.tokens} tokens, k {size.k}"
        print_table(title, ["arm", "ms", "of SAELens's best", "of dense's best", "peak MiB"], rows)


def run(results: Results, budget: Budget, sizes: list[str], runs: int) -> None:
    """Measure the steps of all sizes, one after the other."""
    for size in sizes:
        if budget.is_over("step"):
            results.skip("step", size, "", budget.reason("step"))
            continue
        measured = Measured(size, results)
        measured.build(budget)
        measured.measure(runs)
        measured.report()
        if any("compiled" in arm for arm in measured.arms):
            torch.compiler.reset()  # else the next size is compiled for any shape
        del measured
        free_memory(results.device)

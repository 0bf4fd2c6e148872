"""The GPU benchmark, in the form that runs on a CPU: every section leaves its rows, and what is missing or late is said."""

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--sizes", "tiny"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module; its folder is on the path while the test runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figures(found: list[dict[str, str]], section: str) -> dict[tuple[str, str], float]:
    """Value by arm and figure of one section's rows that have a value."""
    return {(row["arm"], row["figure"]): float(row["value"]) for row in found if row["section"] == section and row["value"]}


def test_the_tiny_form_leaves_rows_of_every_section(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gpu.PACKAGES, "no_such_package", "no-such-package")
    with torch.random.fork_rng():
        assert gpu.main([*TINY, "--runs", "1", "--out", str(tmp_path / "gpu.csv")]) == 0
    found = rows(tmp_path / "gpu.csv")
    assert {row["device"] for row in found} == {"CPU"} and {row["torch"] for row in found} == {torch.__version__}
    assert not [row for row in found if row["figure"] == "skipped" and row["arm"] != "sparsify"]
    checks = figures(found, "checks")
    assert len([arm for arm, figure in checks if figure == "float64 against the CPU"]) == len(
        importlib.import_module("gpu_checks").VARIANTS
    )
    assert all(0 < value < 1e-4 for (_, figure), value in checks.items() if figure.startswith("float32"))
    steps = figures(found, "step")
    arms = {"ours, solo", "ours, joint 10/5", "ours, TopK by row", "SAELens, autocast, compiled", "dense, autocast, compiled"}
    assert arms <= {arm for arm, figure in steps if figure == "step"}
    best = min(value for (arm, figure), value in steps.items() if arm.startswith("SAELens") and figure == "step")
    assert steps["ours, solo", "of SAELens's best"] == pytest.approx(steps["ours, solo", "step"] / best, rel=1e-2)
    parts = figures(found, "parts")
    assert parts["ours, joint 10/5", "launches"] > parts["ours, solo", "launches"] > 0
    assert 0 < parts["ours, solo", "optimiser"] < parts["ours, solo", "step"]
    run = figures(found, "run")
    assert {"ours, solo", "ours, joint", "SAELens, autocast", "model alone, 8 contexts a pass"} == {
        arm for arm, figure in run if figure == "tokens"
    }
    assert figures(found, "test")["ours, joint", "metasae test, 512 tokens"] > 0


def test_a_weight_that_differs_from_the_cpus_ends_with_status_1(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checks = importlib.import_module("gpu_checks")
    monkeypatch.setattr(checks, "VARIANTS", {"solo": checks.VARIANTS["solo"]})
    module_of, built = checks.module_of, list[Any]()

    # The second of the four is the one trained on the device in float64.
    def one_weight_moved(*args: Any) -> Any:
        built.append(module_of(*args))
        if len(built) == 2:
            with torch.no_grad():
                built[1].primary.sae.b_enc[0] += 1e-6
        return built[-1]

    monkeypatch.setattr(checks, "module_of", one_weight_moved)
    with torch.random.fork_rng():
        assert gpu.main([*TINY, "--only", "checks", "--out", str(tmp_path / "gpu.csv")]) == 1
    assert "DIFFERS in float64" in next(row["note"] for row in rows(tmp_path / "gpu.csv") if row["figure"] == "float64 against the CPU")


def test_what_would_begin_after_its_time_is_skipped_with_a_row(gpu: Any, tmp_path: Path):
    assert gpu.main([*TINY, "--budget-seconds", "0", "--out", str(tmp_path / "gpu.csv")]) == 0
    skipped = [row for row in rows(tmp_path / "gpu.csv") if row["figure"] == "skipped"]
    assert {row["section"] for row in skipped} == set(gpu.SECTIONS)
    assert {row["note"] for row in skipped} == {"skipped: its time was over at 0 s"}


def test_an_arm_that_fails_leaves_the_others_and_status_1(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def too_large(size: Any, device: Any) -> Any:
        raise torch.OutOfMemoryError

    def broken(size: Any, device: Any) -> Any:
        raise RuntimeError("a reason\nand more")

    steps = importlib.import_module("gpu_steps")
    monkeypatch.setattr(steps, "SUBJECTS", {"large": too_large, "broken": broken, "product": steps.SUBJECTS["product"]})
    assert gpu.main([*TINY, "--only", "step", "--runs", "1", "--out", str(tmp_path / "gpu.csv")]) == 1
    found = rows(tmp_path / "gpu.csv")
    notes = {row["arm"]: row["note"] for row in found if row["figure"] == "skipped"}
    assert notes == {"large": "does not fit in the device's memory", "broken": "failed: RuntimeError: a reason"}
    assert ("encoder product, fp32", "step") in figures(found, "step")


@pytest.mark.parametrize(
    ("words", "message"), [([], "sees no GPU here"), (["--device", "cpu"], "on a CPU only the form that tests this script runs")]
)
def test_without_a_gpu_one_line_says_so(gpu: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


# Two steps: each of two kernels from one graph, one alone, and a read of a number; the wait at the end is the benchmark's own.
def test_parts_of_a_trace_are_those_of_one_step(gpu: Any):
    def event(category: str, name: str, microseconds: float, correlation: int) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "dur": microseconds, "args": {"correlation": correlation}}

    trace: list[dict[str, Any]] = [{"ph": "M", "name": "process_name"}, event("gpu_user_annotation", "Optimizer.step#Adam.step", 900, 0)]
    for step in (10, 20):
        trace += [event("kernel", "void cutlass::Kernel2<cutlass_80_gemm>(Params)", 300, step), event("kernel", "decode_rows", 100, step)]
        trace += [event("kernel", "void at::native::radixSortKVInPlace<2>(int)", 50, step + 1)]
        trace += [event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 2, step + 2)]
        trace += [event("cuda_runtime", "cudaGraphLaunch", 9, step), event("cuda_driver", "cuLaunchKernel", 9, step + 1)]
        trace += [event("cuda_runtime", "cudaMemcpyAsync", 9, step + 2), event("cuda_runtime", "cudaStreamSynchronize", 9, step + 3)]
    trace.append(event("cuda_runtime", "cudaDeviceSynchronize", 9, 99))
    parts = importlib.import_module("gpu_parts").parts_of(trace, 2)
    expected = {"product": 0.3, "decode_rows": 0.1, "selection, sort": 0.05, "copy to the host": 0.002}
    assert parts.milliseconds == pytest.approx(expected)
    assert (parts.kernels, parts.launches, parts.waits) == (4, 2, 1)

"""What this tree does on one GPU: is it right, how fast are its steps, runs and evaluation, and where does the time go?

    python benchmarks/gpu.py                                # every section, under four minutes
    python benchmarks/gpu.py --only checks step --sizes paper
    python benchmarks/gpu.py --device cpu --sizes tiny      # the whole script in seconds, to test it; its figures mean nothing

Nothing is downloaded. A package that is missing is named and its rows are skipped. The sections share the seconds of `--budget-seconds`;
what would begin after its section's time is skipped, with a row that says so. The status is 1 where a check or an arm has failed.
"""

import argparse
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # this tree, whether or not it is installed

import gpu_checks
import gpu_parts
import gpu_runs
import gpu_steps
from gpu_arms import SIZES
from gpu_results import PACKAGES, Budget, Results

# The sections and their shares of the time.
SECTIONS = {"checks": 2.0, "step": 5.0, "parts": 0.7, "run": 3.5, "test": 1.3}


def arguments(words: list[str] | None) -> argparse.Namespace:
    """The parsed command line; without a GPU, one line and status 2, unless the tiny form on a CPU is asked for."""
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with the size tiny")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["paper", "laptop", "gemma"])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--runs", type=int, default=15, help="steps of each arm")
    parser.add_argument("--budget-seconds", type=float, default=240.0)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/gpu.csv"))
    args = parser.parse_args(words)
    if args.runs < 1:
        parser.error("--runs must be at least 1")
    if torch.device(args.device).type == "cpu":
        if args.sizes != ["tiny"]:
            parser.error("on a CPU only the form that tests this script runs: --device cpu --sizes tiny")
    elif not torch.cuda.is_available():
        print(f"gpu.py: error: torch {torch.__version__} sees no GPU here; --device cpu --sizes tiny tests this script", file=sys.stderr)
        raise SystemExit(2)
    return args


def missing_packages() -> str:
    """One line that names the packages that this script can use and does not find; empty if there are none."""
    absent = [name if name == module else f"{module} ({name})" for module, name in PACKAGES.items() if find_spec(module) is None]
    return f"missing here, so that its rows are skipped: {', '.join(absent)}" if absent else ""


def main(words: list[str] | None = None) -> int:
    """Run the sections, print their tables and write the rows to a CSV file; returns the exit status."""
    args = arguments(words)
    warnings.simplefilter("ignore")
    device, tiny = torch.device(args.device), args.sizes == ["tiny"]
    budget = Budget(args.budget_seconds, {section: share for section, share in SECTIONS.items() if section in args.only})
    with Results(args.out, device) as results, gpu_runs.workplace(device, tiny=tiny) as work:
        print(", ".join(f"{name} {value}" for name, value in results.machine.items() if value))
        if line := missing_packages():
            print(line)
        run_size = "tiny" if tiny else "gpt2_large_l20"
        sections = {
            "checks": lambda: gpu_checks.run(results, budget, tiny=tiny),
            "step": lambda: gpu_steps.run(results, budget, args.sizes, args.runs),
            "parts": lambda: gpu_parts.run(results, budget, args.sizes[0]),
            "run": lambda: gpu_runs.run(results, budget, work, run_size),
            "test": lambda: gpu_runs.run_test(results, budget, work, run_size),
        }
        for section, measure in sections.items():
            if section in args.only:
                measure()
                results.add(section, "", "", "ended after", round(budget.elapsed, 1), "s")
        print(f"\n{budget.elapsed:.0f} s; {results.failed or 'no'} failures; all rows: {args.out}")
        return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())

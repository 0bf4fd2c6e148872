"""Compile every kernel of the GPU path for sm_80 and sm_90, which needs no GPU, and print its registers, spilled and shared bytes.

python benchmarks/gpu_kernels.py
python benchmarks/gpu_kernels.py --widths 1280 --most-registers 32   # too few registers: kernels spill, the command fails
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from metasae_lightning.compute.gpu import row_kernels, select_kernels, sparse_kernels

# The widths of the paper's models.
WIDTHS = (576, 1280, 3584)
CAPABILITIES = (80, 90)
TYPES = {torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, as the package's launchers ask for it."""

    kernel: Any
    arguments: Sequence[Tensor | float]
    constants: Mapping[str, int]
    n_warps: int


@dataclass(frozen=True)
class Usage:
    """What one program of a compiled kernel needs: registers a thread, bytes of local memory a thread, bytes of shared memory."""

    registers: int
    spilled: int
    shared: int


def recorded_launches(width: int) -> dict[str, Launch]:
    """The launches of every function of the GPU path on rows of `width` columns, by name, recorded in place of being made."""
    launches: dict[str, Launch] = {}

    def record(kernel: Any, grid: tuple[int, ...], arguments: Sequence[Tensor | float], constants: Mapping[str, int], n_warps: int) -> None:
        flags = [flag.lower() for flag in ("SCALED", "EVEN", "SPLIT") if constants.get(flag)]
        launches[" ".join([kernel.__name__.removesuffix("_kernel"), *flags])] = Launch(kernel, arguments, constants, n_warps)

    W, keys = torch.zeros(16, width), torch.zeros(16, dtype=torch.int64)
    values, columns = torch.zeros(256), torch.zeros(256, dtype=torch.int32)
    pointers = torch.zeros(17, dtype=torch.int32)
    modules = (row_kernels, select_kernels, sparse_kernels)
    with patch.object(modules[0], "launch", record), patch.object(modules[1], "launch", record), patch.object(modules[2], "launch", record):
        for even in (torch.zeros(16, 1024), torch.zeros(16, 1008)):
            for scale in (None, even[0]):
                select_kernels.compact(even, even[0], scale, torch.zeros(()), keys, columns[:1], 0)
        sparse_kernels.product(values, columns, pointers, W)
        sparse_kernels.product_and_sums(values, columns, pointers, W)
        sparse_kernels.sampled(columns, columns, W, W)
        sparse_kernels.reconstruction_error(values, columns, columns, pointers, W, W[0], W)
        row_kernels.unit_rows(W, W)
        row_kernels.remove_radial(W, W)
        row_kernels.decomposability(W, W, 1.0)
    return launches


def compiled(launch: Launch, capability: int, most_registers: int | None) -> Any:
    """The kernel compiled as its launch would: the same types, alignments and constants."""
    names = launch.kernel.arg_names[: len(launch.arguments)]
    arguments = list(zip(names, launch.arguments, strict=True))
    signature = {name: TYPES[a.dtype] if isinstance(a, Tensor) else {int: "i32", float: "fp32"}[type(a)] for name, a in arguments}
    generic = launch.kernel.do_not_specialize or ()
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, a) in enumerate(arguments)
        if name not in generic and not isinstance(a, float) and (a.data_ptr() if isinstance(a, Tensor) else a) % 16 == 0
    }
    source = ASTSource(launch.kernel, signature | dict.fromkeys(launch.constants, "constexpr"), dict(launch.constants), attributes)
    options = {"num_warps": launch.n_warps, "enable_fp_fusion": True, "maxnreg": most_registers}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def usage(cubin: bytes) -> Usage:
    """What cuobjdump says that a kernel needs. A spilled register is in the thread's stack or local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return Usage(found["REG"], found["STACK"] + found["LOCAL"], found["SHARED"])


def main() -> None:
    """Print the table; fail if a kernel spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES)
    parser.add_argument("--most-registers", type=int)
    args = parser.parse_args()
    print(f"{'kernel':24} {'width':>5} {'sm':>3} {'warps':>5} {'registers':>9} {'spilled':>7} {'shared':>6}  bytes")
    spilled = 0
    for width in args.widths:
        for name, launch in recorded_launches(width).items():
            for capability in args.capabilities:
                kernel = compiled(launch, capability, args.most_registers)
                need = usage(kernel.asm["cubin"])
                shared = max(need.shared, kernel.metadata.shared)
                print(f"{name:24} {width:5} {capability:3} {launch.n_warps:5} {need.registers:9} {need.spilled:7} {shared:6}", flush=True)
                spilled += need.spilled
    sys.exit(f"{spilled} bytes spilled" if spilled else 0)


if __name__ == "__main__":
    main()

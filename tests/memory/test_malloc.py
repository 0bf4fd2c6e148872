"""malloc keeps freed blocks: page faults, counted by the system in processes of their own."""

import os
import subprocess
import sys

import pytest

from metasae_lightning.memory import malloc

FAULTS = """
import resource, runpy, sys, torch
keeps = runpy.run_path(sys.argv[2])["keep_freed_blocks"]() if sys.argv[1] == "keep" else None
def work():
    a = torch.ones(6 * 2**20)  # 24 MiB each, as in a forward pass
    b, c = a + 1, a * 2
    del b
    d = c + a
for _ in range(5):
    work()  # until malloc has allocated every block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(keeps, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str, **environment: str) -> tuple[str, int]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    process = subprocess.run(
        [sys.executable, "-c", FAULTS, mode, malloc.__file__], env={**env, **environment}, capture_output=True, text=True, check=True
    )
    keeps, n_faults = process.stdout.split()
    return keeps, int(n_faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_keeping_freed_blocks_causes_few_page_faults():
    keeps, few = page_faults("keep")
    _, many = page_faults("default", MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536")
    assert keeps == "True" and 10 * few < many


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs glibc")
def test_malloc_environment_variables_take_precedence():
    assert page_faults("keep", MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536")[0] == "False"

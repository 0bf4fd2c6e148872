"""malloc keeps freed blocks: page faults, counted by the system in processes of their own."""

import os
import subprocess
import sys

import pytest

from metasae_lightning.memory import malloc

FAULTS = """
import resource, runpy, sys, torch
kept = runpy.run_path(sys.argv[2])["keep_freed_blocks"]() if sys.argv[1] == "kept" else None
def work():
    a = torch.ones(6 * 2**20)  # 24 MiB each, as a forward pass's
    b, c = a + 1, a * 2
    del b
    d = c + a
for _ in range(5):
    work()  # until every block has its place
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, how, malloc.__file__], env={**env, **environment}, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_kept_blocks_cause_few_page_faults():
    kept, few = faults("kept")
    _, many = faults("as it is", MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536")
    assert kept == "True" and 10 * few < many


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_glibcs_own_variables_take_precedence():
    assert faults("kept", MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536")[0] == "False"

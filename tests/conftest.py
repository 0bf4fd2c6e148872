"""The checker of the package's annotations (pyproject.toml names it), Triton's interpreter, and the mark `long` of long_tests.txt."""

import importlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from beartype import BeartypeConf, beartype

# Python's typing lets an int stand where a float is asked for (PEP 484), and YAML writes 10 for 10.0; beartype alone does not.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

# Without a GPU the kernels run in Triton's interpreter. A function of Triton's is made for it or not when its module is imported, and
# pytest imports lightning, torch and Triton before this file, for the warnings' category in pyproject.toml.
if find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for module in ("triton.language.standard", "triton.language"):
        importlib.reload(importlib.import_module(module))

# Tests and whole files, as `make long-tests` measured them.
LONG_TESTS = frozenset((Path(__file__).parent / "long_tests.txt").read_text().split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tests, so that `make test-quick` leaves them out."""
    for item in items:
        name = item.nodeid.split("[")[0]
        if name in LONG_TESTS or name.split("::")[0] in LONG_TESTS:
            item.add_marker(pytest.mark.long)

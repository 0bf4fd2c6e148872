"""The checker of the package's annotations (pyproject.toml names it), and the mark `long` of the tests in long_tests.txt."""

from pathlib import Path

import pytest
from beartype import BeartypeConf, beartype

# Python's typing lets an int stand where a float is asked for (PEP 484), and YAML writes 10 for 10.0; beartype alone does not.
check = beartype(conf=BeartypeConf(is_pep484_tower=True))

# Tests and whole files, as `make long-tests` measured them.
LONG_TESTS = frozenset((Path(__file__).parent / "long_tests.txt").read_text().split())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tests, so that `make test-quick` leaves them out."""
    for item in items:
        name = item.nodeid.split("[")[0]
        if name in LONG_TESTS or name.split("::")[0] in LONG_TESTS:
            item.add_marker(pytest.mark.long)

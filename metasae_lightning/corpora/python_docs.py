"""A text source: the documentation of the installed Python packages."""

import ast
import random
import sys
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metasae_lightning.corpora.base import Corpus
from metasae_lightning.corpora.documents import Document, order_seed
from metasae_lightning.errors import InputError

# Triple quotes, as in docstrings of several lines.
TRIPLE_QUOTES = (b'"""', b"'''")
# The fields of a syntax tree node that hold nested statements.
STATEMENT_FIELDS = ("body", "handlers", "orelse", "finalbody", "cases")


class PythonDocs(Corpus):
    """The docstrings of the installed Python packages, in a shuffled order of files.

    Files are parsed, never imported. A file without triple quotes is skipped.

    Args:
        min_characters: The minimum length of a docstring in characters; shorter docstrings are left out.
    """

    def __init__(self, min_characters: int = 200):
        self.min_characters = min_characters

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        """All docstrings of at least `min_characters` characters."""
        files = _installed_sources()
        if not files:
            raise InputError(f"corpus: no package is installed in {sysconfig.get_path('purelib')!r}")
        random.Random(order_seed(seed, epoch)).shuffle(files)
        for file in files:
            yield from (text for text in _docstrings(file) if len(text) >= self.min_characters)

    def description(self) -> str:
        """A text such as "docstrings of Python 3.12's installed packages", with the version of the running Python."""
        return f"docstrings of Python {sys.version_info.major}.{sys.version_info.minor}'s installed packages"

    def settings(self) -> dict[str, Any]:
        """The minimum length of a docstring."""
        return {"min_characters": self.min_characters}


def _installed_sources() -> list[Path]:
    """All Python files of the installed packages."""
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    # Sorted by the path inside the environment: equal environments in different folders have the same order.
    return [file for _, file in sorted((str(file.relative_to(root)), file) for root in roots for file in root.rglob("*.py"))]


def _docstrings(file: Path) -> Iterator[str]:
    """The docstrings of the module, classes and functions in one file; none if it has no triple quotes or cannot be parsed."""
    try:
        source = file.read_bytes()
        if not any(quotes in source for quotes in TRIPLE_QUOTES):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    # Some packages ship templates and test files that are not valid Python, or nested too deeply for the parser.
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    # Only statements can have docstrings. `ast.walk` would visit all expressions too, which is slow.
    nodes = deque[ast.AST]([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        for field in STATEMENT_FIELDS:
            nodes.extend(getattr(node, field, None) or ())

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
from metasae_lightning.corpora.documents import Document, mix
from metasae_lightning.errors import InputError

# How a docstring of some length is quoted, and where statements hold statements.
TRIPLE = (b'"""', b"'''")
BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")


class PythonDocs(Corpus):
    """The docstrings of the installed packages, parsed and never imported, in a shuffled order of files."""

    def __init__(self, min_characters: int = 200):
        self.min_characters = min_characters

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Iterator[Document]:
        files = _installed_sources()
        if not files:
            raise InputError(f"corpus: no package is installed in {sysconfig.get_path('purelib')!r}")
        random.Random(mix(seed, epoch)).shuffle(files)
        for file in files:
            yield from (text for text in _docstrings(file) if len(text) >= self.min_characters)

    def description(self) -> str:
        return f"docstrings of Python {sys.version_info.major}.{sys.version_info.minor}'s installed packages"

    def settings(self) -> dict[str, Any]:
        return {"min_characters": self.min_characters}


def _installed_sources() -> list[Path]:
    roots = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
    # By the path inside the environment, so that two equal environments at different places give one order.
    return [file for _, file in sorted((str(file.relative_to(root)), file) for root in roots for file in root.rglob("*.py"))]


def _docstrings(file: Path) -> Iterator[str]:
    try:
        source = file.read_bytes()
        if not any(quotes in source for quotes in TRIPLE):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    # Packages ship templates and tests that are no Python, and some nest deeper than the parser goes.
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return
    # What can hold a docstring is a statement among statements: `ast.walk` would go through every expression too.
    nodes = deque[ast.AST]([tree])
    while nodes:
        node = nodes.popleft()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        for block in BLOCKS:
            nodes.extend(getattr(node, block, None) or ())

"""Show the doctests of docstrings as code: mkdocs reads `>>>` outside a fence as a quotation."""

import re

import griffe


class DoctestBlocks(griffe.Extension):
    """Puts each run of doctest lines into a fence."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite the docstring of a class, function or module."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)(^>>> (?:.+\n?)+)", lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", obj.docstring.value)

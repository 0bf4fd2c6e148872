"""Pickles from outside, read without running code: a pickle that names anything but the allowed types is refused."""

import io
import pickle
from collections.abc import Collection
from typing import Any


def loads(content: bytes, allowed: Collection[tuple[str, str]] = ()) -> Any:
    """The object of a pickle. One that names a type outside `allowed`, a module and a name each, is a `pickle.UnpicklingError`.

    >>> loads(pickle.dumps({"a": [1, "b", None]}))
    {'a': [1, 'b', None]}
    >>> loads(pickle.dumps(print))
    Traceback (most recent call last):
    _pickle.UnpicklingError: it names builtins.print
    """
    return _Unpickler(io.BytesIO(content), allowed).load()


class _Unpickler(pickle.Unpickler):
    """An unpickler that finds the allowed types alone."""

    def __init__(self, file: io.BytesIO, allowed: Collection[tuple[str, str]]) -> None:
        super().__init__(file)
        self._allowed = allowed

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The type, if it is allowed."""
        if (module_name, global_name) not in self._allowed:
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")
        return super().find_class(module_name, global_name)

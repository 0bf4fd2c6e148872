"""Packages that import a name's module when the name is first used (PEP 562), so that importing the package itself takes no time."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The functions `__getattr__` and `__dir__` of a package.

    A submodule that nobody has imported yet is imported on first use too.

    Args:
        package: The package's `__name__`.
        modules: The module that defines each exported name.

    >>> get, names = lazy_exports("metasae_lightning", {"InputError": "metasae_lightning.errors"})
    >>> get("InputError").__name__, "InputError" in names()
    ('InputError', True)
    >>> get("InputErorr")
    Traceback (most recent call last):
    AttributeError: module 'metasae_lightning' has no attribute 'InputErorr'
    """

    def __getattr__(name: str) -> Any:
        missing = AttributeError(f"module {package!r} has no attribute {name!r}")
        if name in modules:
            try:
                value = getattr(import_module(modules[name]), name)
            except ImportError as error:
                from metasae_lightning.library_versions import version_conflict

                raise ImportError(version_conflict() or str(error), name=error.name, path=error.path) from error
        elif name.startswith("_"):
            raise missing
        else:
            submodule = f"{package}.{name}"
            try:
                value = import_module(submodule)
            except ModuleNotFoundError as error:
                if error.name != submodule:
                    raise
                raise missing from None
        # The next use finds it without a call.
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return __getattr__, __dir__

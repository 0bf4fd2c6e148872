"""Installed libraries that exclude each other."""

from importlib import metadata


def version_conflict(library: str = "sae-lens", needed: str = "transformer-lens") -> str | None:
    """One line where `needed` is installed in a version that `library` does not accept; None otherwise.

    The accepted versions are those of the library's own metadata, so a newer sae-lens may accept a newer transformer-lens.

    >>> version_conflict()
    """
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires(library) or []]
        installed, own_version = metadata.version(needed), metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
    for bound in (requirement.specifier for requirement in requirements if requirement.name == needed):
        if not bound.contains(installed, prereleases=True):
            return f"{library} {own_version} needs {needed}{bound}, and {installed} is installed: pip install '{needed}{bound}'"
    return None

"""Where things are published: a folder, or a repository on the Hugging Face Hub. What is put there appears whole or not at all."""

import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from metasae_lightning.errors import InputError

HUB = "hf://"
SECRET = re.compile(r"hf_[A-Za-z0-9_]{4,}")
SECRETS = {"token", "use_auth_token", "hf_token", "api_key", "password", "secret"}


class Destination(ABC):
    """A tree of files, by paths with slashes."""

    place: str

    @abstractmethod
    def listing(self) -> set[str]:
        """What is there."""

    @abstractmethod
    def read(self, path: str) -> str:
        """The text of a file that is there."""

    @abstractmethod
    def put(self, draft: Path, message: str) -> str:
        """Everything in a folder, over what is there by the same paths; returns where it is."""


@final
class Folder(Destination):
    """A local folder."""

    def __init__(self, place: str | Path) -> None:
        self.place, self.path = str(place), Path(place)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{place} is a file, and SAEs go into a folder")

    def listing(self) -> set[str]:
        files = (path.relative_to(self.path) for path in self.path.rglob("*") if path.is_file())
        return {file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)}

    def read(self, path: str) -> str:
        return (self.path / path).read_text()

    def put(self, draft: Path, message: str) -> str:
        """Beside what it replaces until every byte is written; then renamed, the folders of SAEs first."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".publishing-") as room:
                copy = Path(room) / "new"
                shutil.copytree(draft, copy)
                for number, folder in enumerate(leaves(copy)):
                    self._swap(copy / folder, self.path / folder, Path(room) / f"old-{number}")
                for file in sorted(path for path in copy.iterdir() if path.is_file()):
                    file.replace(self.path / file.name)
        except OSError as error:
            raise InputError(f"cannot write {error.filename or self.path}: {error.strerror or error}") from error
        return str(self.path)

    @staticmethod
    def _swap(new: Path, place: Path, old: Path) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place.rename(old)
        try:
            new.rename(place)
        except OSError:
            if old.exists():
                old.rename(place)
            raise


def leaves(tree: Path) -> list[Path]:
    """The folders that hold files, deepest last."""
    return sorted({path.parent.relative_to(tree) for path in tree.rglob("*") if path.is_file()} - {Path()})


@final
class Hub(Destination):
    """A repository of models, made where there is none; an upload is one commit: a broken one leaves nothing, and can be repeated."""

    def __init__(self, place: str, *, private: bool | None = None, revision: str | None = None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        self.place, self.repository = place, place.removeprefix(HUB)
        self.private, self.revision, self.api = private, revision, HfApi(library_name="metasae-lightning")
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise InputError(f"{place!r} is no repository: that would be {HUB}OWNER/NAME") from error
        if self.repository.count("/") != 1:
            raise InputError(f"{place!r} is no repository: that would be {HUB}OWNER/NAME")

    def listing(self) -> set[str]:
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._told():
            try:
                return set(self.api.list_repo_files(self.repository, revision=self.revision))
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return set()

    def read(self, path: str) -> str:
        with self._told():
            return Path(self.api.hf_hub_download(self.repository, path, revision=self.revision)).read_text()

    def put(self, draft: Path, message: str) -> str:
        from huggingface_hub import CommitOperationAdd

        files = sorted(path for path in draft.rglob("*") if path.is_file())
        with self._told():
            self.api.create_repo(self.repository, private=self.private, exist_ok=True)
            if self.revision is not None:
                self.api.create_branch(self.repository, branch=self.revision, exist_ok=True)
            added = [CommitOperationAdd(path.relative_to(draft).as_posix(), path) for path in files]
            commit = self.api.create_commit(self.repository, added, commit_message=message, revision=self.revision)
            self._check(draft, files)
        return commit.commit_url

    def _check(self, draft: Path, files: Sequence[Path]) -> None:
        """What the Hub says it has is what was sent."""
        paths = {path.relative_to(draft).as_posix(): path.stat().st_size for path in files}
        there = {
            info.path: getattr(info, "size", None) for info in self.api.get_paths_info(self.repository, [*paths], revision=self.revision)
        }
        if wrong := [path for path, size in paths.items() if there.get(path) != size]:
            raise InputError(f"{self.place}: what arrived is not what was sent ({', '.join(wrong)}): publish again")

    @contextmanager
    def _told(self) -> Generator[None, None, None]:
        """What the Hub refuses in one line, in which no token is; the client raises whatever its libraries raise."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            causes = [error, error.__cause__] if error.__cause__ else [error]
            said = "; ".join(" ".join(f"{type(cause).__name__}: {cause}".split())[:300] for cause in causes)
            raise InputError(f"{self.place}: the Hub did not take it, and nothing is changed there: {hidden(said)}") from None


def destination(place: str | Path, *, private: bool | None = None, revision: str | None = None) -> Destination:
    """A folder by its path, a repository on the Hub by `hf://OWNER/NAME`."""
    if str(place).startswith(HUB):
        return Hub(str(place), private=private, revision=revision)
    if private is not None or revision is not None:
        raise InputError(f"private and revision are of the Hub, and {place} is a folder: {HUB}OWNER/NAME is a repository")
    return Folder(place)


def hidden(tree: Any) -> Any:
    """A text or a tree of settings without what opens doors.

    >>> hidden({"name": "gpt2", "token": "mine", "said": "no hf_abcdefgh here"})
    {'name': 'gpt2', 'said': 'no hf_*** here'}
    """
    if isinstance(tree, Mapping):
        return {key: hidden(value) for key, value in tree.items() if str(key).lower() not in SECRETS}
    if isinstance(tree, list | tuple):
        return [hidden(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    own = os.environ.get("HF_TOKEN")
    return SECRET.sub("hf_***", tree.replace(own, "hf_***") if own else tree)

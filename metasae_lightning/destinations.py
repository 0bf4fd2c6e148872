"""Where things are published: a folder, or a repository on the Hugging Face Hub. What is put there appears whole or not at all."""

import hashlib
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

from metasae_lightning.errors import InputError
from metasae_lightning.redaction import hidden

HUB = "hf://"


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
    def same(self, path: str, file: Path) -> bool:
        """Whether a file that is there holds the bytes of a local one."""

    @abstractmethod
    def put(self, draft: Path, message: str, *, remove: Sequence[str] = ()) -> str:
        """Every file in a folder, over what is there by the same paths, and others away; returns where it is."""


@final
class Folder(Destination):
    """A local folder."""

    def __init__(self, place: str | Path) -> None:
        self.place, self.path = str(place), Path(place)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{place} is a file, and SAEs go into a folder")

    def listing(self) -> set[str]:
        return {path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()}

    def read(self, path: str) -> str:
        return text_of(self.path / path)

    def same(self, path: str, file: Path) -> bool:
        return (self.path / path).read_bytes() == file.read_bytes()

    def put(self, draft: Path, message: str, *, remove: Sequence[str] = ()) -> str:
        """Written beside what it replaces to the last byte, then renamed; what was replaced comes back if a rename fails."""
        files = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".publishing-") as room:
                new, old = Path(room) / "new", Path(room) / "old"
                shutil.copytree(draft, new)
                moves = [(self.path / name, old / name) for name in [*files, *map(Path, remove)] if (self.path / name).exists()]
                moves += [(new / name, self.path / name) for name in files]
                self._move(moves)
        except OSError as error:
            raise InputError(f"cannot write {error.filename2 or error.filename or self.path}: {error.strerror or error}") from error
        return str(self.path.absolute())  # a path that looks like a repository's name is told from one

    @staticmethod
    def _move(moves: Sequence[tuple[Path, Path]]) -> None:
        done: list[tuple[Path, Path]] = []
        try:
            for start, end in moves:
                end.parent.mkdir(parents=True, exist_ok=True)
                start.rename(end)
                done.append((start, end))
        except OSError:
            for start, end in reversed(done):
                end.rename(start)
            raise


@final
class Hub(Destination):
    """A repository of models, made where there is none; an upload is one commit on what was listed: a broken one can be repeated."""

    def __init__(self, place: str, *, private: bool | None = None, revision: str | None = None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        self.place, self.repository = place, place.removeprefix(HUB)
        self.private, self.revision, self.api = private, revision, HfApi(library_name="metasae-lightning")
        self._commit: str | None = None
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise InputError(f"{place!r} is no repository: that would be {HUB}OWNER/NAME") from error
        if self.repository.count("/") != 1:
            raise InputError(f"{place!r} is no repository: that would be {HUB}OWNER/NAME")

    def listing(self) -> set[str]:
        """At one commit, which is what an upload then goes on from; a branch that is to be made begins where the main one is."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._told():
            try:
                try:
                    info = self.api.repo_info(self.repository, revision=self.revision)
                except RevisionNotFoundError:
                    info = self.api.repo_info(self.repository)
            except RepositoryNotFoundError:
                return set()
            if self.private is not None and info.private is not None and self.private != info.private:
                now = "private" if info.private else "public"
                raise InputError(f"{self.place} is {now}, and publishing does not change that: change it on the Hub first")
            self._commit = info.sha
            return set(self.api.list_repo_files(self.repository, revision=self._commit))

    def read(self, path: str) -> str:
        with self._told():
            return text_of(Path(self.api.hf_hub_download(self.repository, path, revision=self._commit)))

    def same(self, path: str, file: Path) -> bool:
        with self._told():
            return self._holds(path, file, self._commit)

    def put(self, draft: Path, message: str, *, remove: Sequence[str] = ()) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = {path.relative_to(draft).as_posix(): path for path in sorted(draft.rglob("*")) if path.is_file()}
        with self._told():
            self.api.create_repo(self.repository, private=self.private, exist_ok=True)
            if self.revision is not None:
                self.api.create_branch(self.repository, branch=self.revision, exist_ok=True)
            operations = [*(CommitOperationAdd(name, path) for name, path in files.items()), *map(CommitOperationDelete, remove)]
            where: dict[str, Any] = {"revision": self.revision, "parent_commit": self._commit}
            commit = self.api.create_commit(self.repository, operations, commit_message=message, **where)
            if wrong := [name for name, path in files.items() if not self._holds(name, path, commit.oid)]:
                raise InputError(f"{self.place}: what arrived is not what was sent ({', '.join(wrong)}): publish again")
        return commit.commit_url

    def _holds(self, name: str, file: Path, commit: str | None) -> bool:
        (info,) = self.api.get_paths_info(self.repository, [name], revision=commit) or (None,)
        lfs, blob = getattr(info, "lfs", None), getattr(info, "blob_id", None)
        content = file.read_bytes()
        if lfs is not None:
            return lfs.sha256 == hashlib.sha256(content).hexdigest()
        return blob == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @contextmanager
    def _told(self) -> Generator[None, None, None]:
        """What goes wrong in one line, in which no token is; the client raises whatever its libraries raise."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            causes = [error, error.__cause__] if error.__cause__ else [error]
            said = "; ".join(" ".join(hidden(f"{type(cause).__name__}: {cause}").split())[:300] for cause in causes)
            raise InputError(f"{self.place}: the Hub did not do as asked, which can be tried again: {said}") from None


def text_of(path: Path) -> str:
    """A file's text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def destination(place: str | Path, *, private: bool | None = None, revision: str | None = None) -> Destination:
    """A folder by its path, a repository on the Hub by `hf://OWNER/NAME`."""
    if str(place).startswith(HUB):
        return Hub(str(place), private=private, revision=revision)
    if private is not None or revision is not None:
        raise InputError(f"private and revision are of the Hub, and {place} is a folder: {HUB}OWNER/NAME is a repository")
    return Folder(place)

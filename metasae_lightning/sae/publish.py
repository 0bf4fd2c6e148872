"""Publish SAELens folders to a local folder or a repository on the Hub."""

import hashlib
import json
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors.torch import save
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.redaction import redact
from metasae_lightning.sae.pretrained import load_pretrained

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
            said = "; ".join(" ".join(redact(f"{type(cause).__name__}: {cause}").split())[:300] for cause in causes)
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


README = "README.md"
RECORD = "metasae.json"
KNOWN = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RECORD)
ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")
# SAELens's own offset under the logarithm of a density.
OFFSET = 1e-10


def stage(source: str | Path, draft: Path, *, metadata: Mapping[str, Any], density: Float[Tensor, " d_sae"] | None = None) -> SAE[Any]:
    """Copy an SAE's folder, with more said of it and how often its latents fire; returns it loaded back, the same to the bit."""
    source = Path(source)
    before = load_pretrained(source)
    copy(source, draft, **metadata)
    if density is not None:
        (draft / SPARSITY_FILENAME).write_bytes(save({"sparsity": (density.float() + OFFSET).log10()}))  # `save_file` hides it from others
    after = load_pretrained(draft)
    theirs, ours = before.state_dict(), after.state_dict()
    if theirs.keys() != ours.keys() or not all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items()):
        raise InputError(f"{source}: what was written does not load back as what it was")
    return after


def publish(
    folders: Mapping[str, str | Path],
    dest: str | Path | Destination,
    *,
    card: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    replace: bool = False,
    remove: Sequence[str] = (),
) -> str:
    """Put SAELens folders, each under its id, into a folder or into `hf://OWNER/NAME`, once each was loaded; returns where they are.

    Another SAE that is there under the same id stays, unless it is to be replaced; so does everything that is no SAE's. What goes out of a
    folder is what SAELens reads and our own record, without tokens. `remove` names ids whose SAEs go away in the same step.
    """
    to = dest if isinstance(dest, Destination) else destination(dest, private=private, revision=revision)
    for name, folder in folders.items():
        if not ID.fullmatch(name) or README in name.split("/"):
            raise InputError(f"{name!r} is no id for an SAE: that would be letters, digits and slashes, such as blocks.8.hook_resid_post")
        load_pretrained(folder)
    there = to.listing()
    for name, folder in folders.items():
        weights = f"{name}/{SAE_WEIGHTS_FILENAME}"
        if not replace and weights in there and not to.same(weights, Path(folder) / SAE_WEIGHTS_FILENAME):
            raise InputError(f"{to.place} holds another SAE under {name}: name another id, or replace it by --replace true")
    with tempfile.TemporaryDirectory() as room:
        tree = Path(room) / "tree"
        for name, folder in folders.items():
            copy(Path(folder), tree / name)
        if card is not None:
            (tree / README).write_text(card, encoding="utf-8")
        new = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
        old = {f"{name}/{file}" for name in (*folders, *remove) for file in KNOWN} & there
        return to.put(tree, f"Add {', '.join(folders)}", remove=sorted(old - new))


def copy(folder: Path, draft: Path, **said: Any) -> None:
    """What is known of an SAE's folder, with more said of it in its config, and no token."""
    draft.mkdir(parents=True)
    for name in KNOWN:
        if (folder / name).exists():
            shutil.copyfile(folder / name, draft / name)
    record = json.loads((folder / SAE_CFG_FILENAME).read_text())
    record["metadata"] = redact({**record.get("metadata", {}), **said})
    (draft / SAE_CFG_FILENAME).write_text(json.dumps(record, indent=1) + "\n")

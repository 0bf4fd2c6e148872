"""Publication of SAELens folders in a local folder or in a repository on the Hub."""

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
    """A tree of files that SAEs are published in; paths in it are relative and have slashes."""

    address: str
    """The folder's path, or `hf://OWNER/NAME`."""

    @abstractmethod
    def list_files(self) -> set[str]:
        """The paths of all files."""

    @abstractmethod
    def read_text(self, path: str) -> str:
        """The text of an existing file."""

    @abstractmethod
    def has_same_bytes(self, path: str, file: Path) -> bool:
        """Whether an existing file has the same bytes as a local one."""

    @abstractmethod
    def write(self, draft: Path, message: str, *, remove: Sequence[str] = ()) -> str:
        """Write every file of the folder `draft` under the same path and delete the files `remove`; returns the address to look at."""


@final
class Folder(Destination):
    """A local folder."""

    def __init__(self, address: str | Path) -> None:
        self.address, self.path = str(address), Path(address)
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{address} is a file, and SAEs go into a folder")

    def list_files(self) -> set[str]:
        """The paths of all files below the folder."""
        return {path.relative_to(self.path).as_posix() for path in self.path.rglob("*") if path.is_file()}

    def read_text(self, path: str) -> str:
        """The text of an existing file."""
        return read_file(self.path / path)

    def has_same_bytes(self, path: str, file: Path) -> bool:
        """Whether an existing file has the same bytes as a local one."""
        return (self.path / path).read_bytes() == file.read_bytes()

    def write(self, draft: Path, message: str, *, remove: Sequence[str] = ()) -> str:
        """Copy the files beside their new places and rename them; if a rename fails, the earlier ones are undone. `message` is unused."""
        files = sorted(path.relative_to(draft) for path in draft.rglob("*") if path.is_file())
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".publishing-") as temporary:
                new, old = Path(temporary) / "new", Path(temporary) / "old"
                shutil.copytree(draft, new)
                moves = [(self.path / name, old / name) for name in [*files, *map(Path, remove)] if (self.path / name).exists()]
                moves += [(new / name, self.path / name) for name in files]
                self._rename_all(moves)
        except OSError as error:
            raise InputError(f"cannot write {error.filename2 or error.filename or self.path}: {error.strerror or error}") from error
        return str(self.path.absolute())  # a relative path could be mistaken for a repository's name

    @staticmethod
    def _rename_all(moves: Sequence[tuple[Path, Path]]) -> None:
        """Rename each first path to the second; after a failure the earlier renames are undone."""
        renamed: list[tuple[Path, Path]] = []
        try:
            for start, end in moves:
                end.parent.mkdir(parents=True, exist_ok=True)
                start.rename(end)
                renamed.append((start, end))
        except OSError:
            for start, end in reversed(renamed):
                end.rename(start)
            raise


@final
class Hub(Destination):
    """A repository of models on the Hub; `write` creates it if it does not exist.

    A write is one commit on top of the commit that `list_files` read, so an interrupted upload can be repeated.
    """

    def __init__(self, address: str, *, private: bool | None = None, revision: str | None = None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        self.address, self.repository = address, address.removeprefix(HUB)
        self.private, self.revision, self.api = private, revision, HfApi(library_name="metasae-lightning")
        self._commit: str | None = None
        try:
            validate_repo_id(self.repository)
        except HFValidationError as error:
            raise InputError(f"{address!r} is not a repository, which would be {HUB}OWNER/NAME") from error
        if self.repository.count("/") != 1:
            raise InputError(f"{address!r} is not a repository, which would be {HUB}OWNER/NAME")

    def list_files(self) -> set[str]:
        """The paths of all files at the newest commit of the revision; for a branch that does not exist yet, of the main branch.

        The other methods use this commit from then on. Without a repository the set is empty. A repository whose visibility differs from
        `private` is an error.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._errors_in_one_line():
            try:
                try:
                    info = self.api.repo_info(self.repository, revision=self.revision)
                except RevisionNotFoundError:
                    info = self.api.repo_info(self.repository)
            except RepositoryNotFoundError:
                return set()
            if self.private is not None and info.private is not None and self.private != info.private:
                visibility = "private" if info.private else "public"
                raise InputError(f"{self.address} is {visibility}, and publishing does not change that: change it on the Hub first")
            self._commit = info.sha
            return set(self.api.list_repo_files(self.repository, revision=self._commit))

    def read_text(self, path: str) -> str:
        """The text of a file at the commit that `list_files` read."""
        with self._errors_in_one_line():
            return read_file(Path(self.api.hf_hub_download(self.repository, path, revision=self._commit)))

    def has_same_bytes(self, path: str, file: Path) -> bool:
        """Whether a file at the commit that `list_files` read has the bytes of a local one; only hashes are compared."""
        with self._errors_in_one_line():
            return self._has_hash_of(path, file, self._commit)

    def write(self, draft: Path, message: str, *, remove: Sequence[str] = ()) -> str:
        """Upload the files in one commit and check their hashes afterwards; returns the commit's URL."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        files = {path.relative_to(draft).as_posix(): path for path in sorted(draft.rglob("*")) if path.is_file()}
        with self._errors_in_one_line():
            self.api.create_repo(self.repository, private=self.private, exist_ok=True)
            if self.revision is not None:
                self.api.create_branch(self.repository, branch=self.revision, exist_ok=True)
            operations = [*(CommitOperationAdd(name, path) for name, path in files.items()), *map(CommitOperationDelete, remove)]
            base: dict[str, Any] = {"revision": self.revision, "parent_commit": self._commit}
            commit = self.api.create_commit(self.repository, operations, commit_message=message, **base)
            if wrong := [name for name, path in files.items() if not self._has_hash_of(name, path, commit.oid)]:
                raise InputError(f"{self.address}: the uploaded files differ from the local ones ({', '.join(wrong)}): publish again")
        return commit.commit_url

    def _has_hash_of(self, name: str, file: Path, commit: str | None) -> bool:
        """Whether the repository's file has the hash of a local one: SHA-256 for LFS files, git's blob hash for others."""
        (info,) = self.api.get_paths_info(self.repository, [name], revision=commit) or (None,)
        lfs, blob = getattr(info, "lfs", None), getattr(info, "blob_id", None)
        content = file.read_bytes()
        if lfs is not None:
            return lfs.sha256 == hashlib.sha256(content).hexdigest()
        return blob == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @contextmanager
    def _errors_in_one_line(self) -> Generator[None, None, None]:
        """A block in which any error of the Hub's client becomes an `InputError` of one line, without access tokens."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            causes = [error, error.__cause__] if error.__cause__ else [error]
            reason = "; ".join(" ".join(redact(f"{type(cause).__name__}: {cause}").split())[:300] for cause in causes)
            raise InputError(f"{self.address}: the Hub request failed; try again: {reason}") from None


def read_file(path: Path) -> str:
    """The text of a local file. If it cannot be read, the InputError names the path."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def open_destination(address: str | Path, *, private: bool | None = None, revision: str | None = None) -> Destination:
    """A repository on the Hub for `hf://OWNER/NAME`, else a local folder; `private` and `revision` are errors with a folder."""
    if str(address).startswith(HUB):
        return Hub(str(address), private=private, revision=revision)
    if private is not None or revision is not None:
        raise InputError(f"private and revision are options of the Hub, and {address} is a folder: {HUB}OWNER/NAME is a repository")
    return Folder(address)


README = "README.md"
RECORD = "metasae.json"
# The files of an SAE's folder that are published.
SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RECORD)
SAE_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")
# SAELens adds this to a density before it takes the logarithm.
DENSITY_OFFSET = 1e-10


def check_id(name: str) -> None:
    """Reject an SAE's id that is no path of letters and digits."""
    if not SAE_ID.fullmatch(name) or README in name.split("/"):
        raise InputError(f"{name!r} is no id for an SAE, which has letters, digits and slashes, such as blocks.8.hook_resid_post")


def stage(source: str | Path, draft: Path, *, metadata: Mapping[str, Any], density: Float[Tensor, " d_sae"] | None = None) -> SAE[Any]:
    """Copy an SAE's folder to the new folder `draft`, with more metadata and its latents' firing rates; returns the loaded copy.

    Weights that differ between the loaded folders are an error.
    """
    source = Path(source)
    before = load_pretrained(source)
    copy_sae_folder(source, draft, metadata)
    if density is not None:
        (draft / SPARSITY_FILENAME).write_bytes(
            save({"sparsity": (density.float() + DENSITY_OFFSET).log10()})
        )  # `save_file` would make it readable by its owner only
    after = load_pretrained(draft)
    original, copied = before.state_dict(), after.state_dict()
    if original.keys() != copied.keys() or not all(torch.equal(tensor, copied[name]) for name, tensor in original.items()):
        raise InputError(f"{source}: the weights differ after they were written and loaded back")
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
    """Publish SAELens folders, by id, in a folder or in `hf://OWNER/NAME`, after loading each; returns the address to look at.

    Another SAE with the same id is an error unless `replace` is set; files that belong to no SAE stay. Published are the files that
    SAELens reads and our record; access tokens and passwords in the config's metadata are left out. `card` becomes the README. `remove`
    names the ids of SAEs to delete in the same write.
    """
    target = dest if isinstance(dest, Destination) else open_destination(dest, private=private, revision=revision)
    for name, folder in folders.items():
        check_id(name)
        load_pretrained(folder)
    existing = target.list_files()
    for name, folder in folders.items():
        weights = f"{name}/{SAE_WEIGHTS_FILENAME}"
        if not replace and weights in existing and not target.has_same_bytes(weights, Path(folder) / SAE_WEIGHTS_FILENAME):
            raise InputError(f"{target.address} holds another SAE under {name}: choose another id, or replace it by --replace true")
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        for name, folder in folders.items():
            copy_sae_folder(Path(folder), tree / name, {})
        if card is not None:
            (tree / README).write_text(card, encoding="utf-8")
        new = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
        old = {f"{name}/{file}" for name in (*folders, *remove) for file in SAE_FILES} & existing
        return target.write(tree, f"Add {', '.join(folders)}", remove=sorted(old - new))


def copy_sae_folder(folder: Path, draft: Path, metadata: Mapping[str, Any]) -> None:
    """Copy the files of an SAE's folder and add `metadata` to the config's, from which tokens and passwords are removed."""
    draft.mkdir(parents=True)
    for name in SAE_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, draft / name)
    config = json.loads((folder / SAE_CFG_FILENAME).read_text())
    config["metadata"] = redact({**config.get("metadata", {}), **metadata})
    (draft / SAE_CFG_FILENAME).write_text(json.dumps(config, indent=1) + "\n")

"""The repositories of the test server `Hub`: their files, branches and large objects, and the requests that change them."""

import base64
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

LARGE = ".safetensors"


class Refused(Exception):
    """An error response: its status, and the body and headers that the client reads."""

    def __init__(self, status: int, message: str, code: str = "", **fields: Any):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **fields}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass(frozen=True)
class Repository:
    """A repository: `main` has the files of the main branch; `internal` has other branches, large objects and the mark `private`."""

    main: Path
    internal: Path

    @property
    def private(self) -> bool:
        return (self.internal / "private").exists()

    def branches(self) -> dict[str, Path]:
        return {"main": self.main} | {folder.name: folder for folder in sorted((self.internal / "branches").glob("*"))}

    def at(self, revision: str | None) -> Path:
        """The folder of a branch, by the branch's name or by its commit."""
        for name, files in self.branches().items():
            if revision in (None, name) or revision == commit(files):
                return files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create(self, private: bool) -> None:
        """Create the repository with a .gitattributes file, as the real hub does."""
        self.main.mkdir(parents=True)
        (self.main / ".gitattributes").write_text(f"*{LARGE} filter=lfs diff=lfs merge=lfs -text\n")
        self.internal.mkdir(parents=True)
        if private:
            (self.internal / "private").touch()

    def create_branch(self, name: str, start: str) -> None:
        """Create a branch that starts as a copy of another."""
        if "/" in name:
            raise Refused(400, f"the test server has no branches with a slash in their name: {name}")
        if name in self.branches():
            raise Refused(409, "Reference already exists")
        shutil.copytree(self.at(start), self.internal / "branches" / name)

    def preupload(self, revision: str, paths: list[str]) -> list[dict[str, Any]]:
        """For each file, the way to upload it (`lfs` or `regular`) and the hash of the file that is there now."""
        files = self.at(revision)
        modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        hashes = {path: etag(files / path) if (files / path).is_file() else None for path in paths}
        return [{"path": path, "uploadMode": modes[path], "shouldIgnore": False, "oid": hashes[path]} for path in paths]

    def object_path(self, oid: str) -> Path:
        """Where a large object is stored."""
        return self.internal / "objects" / oid

    def store_object(self, oid: str, content: bytes) -> None:
        """Store a large object; its hash must be `oid`."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content is not the object's")
        self.object_path(oid).parent.mkdir(parents=True, exist_ok=True)
        self.object_path(oid).write_bytes(content)

    def commit(self, revision: str, lines: list[dict[str, Any]]) -> str:
        """Apply the operations to a copy of the branch, then replace the branch by it: if one is refused, nothing changes."""
        if (files := self.branches().get(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self.internal.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.internal) as temporary:
            new = Path(temporary) / "new"
            shutil.copytree(files, new)
            for line in lines:
                self.apply(new, line["key"], line["value"])
            files.rename(Path(temporary) / "old")
            new.rename(files)
        return commit(files)

    def apply(self, files: Path, key: str, value: dict[str, Any]) -> None:
        """Apply one operation of a commit to a folder."""
        if key == "header":
            if not commit(files).startswith(value.get("parentCommit", "")):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            return
        path = files / value["path"]
        if ".." in path.parts or path == files:
            raise Refused(400, f"not a path in a repository: {value['path']}")
        if key == "deletedFile" or key == "deletedFolder":
            if not (path.is_file() if key == "deletedFile" else path.is_dir()):
                raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            path.unlink() if key == "deletedFile" else shutil.rmtree(path)
            # Git has no empty folders.
            while (path := path.parent) != files and not any(path.iterdir()):
                path.rmdir()
        elif key == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.object_path(value["oid"]).exists():
                raise Refused(400, f"the object was never uploaded: {value['path']}")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.object_path(value["oid"]), path)
        else:
            raise Refused(400, f"unknown operation: {key}")


def check_card(card: str) -> dict[str, Any]:
    """The real hub's answer to a README's metadata before upload: errors and warnings."""
    start, *rest = f"{card}\n".split("---\n", 2)
    if start or len(rest) < 2:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        if isinstance(yaml.safe_load(rest[0]), dict):
            return {"errors": [], "warnings": []}
        message = "not a mapping"
    except yaml.YAMLError as error:
        message = str(error)
    raise Refused(400, "Invalid metadata in README.md", errors=[{"message": message}], warnings=[])


def commit(files: Path) -> str:
    """The commit hash of a folder: a hash of its file names and contents."""
    hashes = ((path.relative_to(files), blob(path.read_bytes())) for path in sorted(files.rglob("*")) if path.is_file())
    return blob("".join(f"{name} {content}\n" for name, content in hashes).encode())


def blob(content: bytes) -> str:
    """Git's blob hash, which the client computes too."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def is_large(path: Path) -> bool:
    """Whether a file is stored as a large object."""
    # The client uploads an empty file as a regular one in any case.
    return path.suffix == LARGE and path.stat().st_size > 0


def etag(path: Path) -> str:
    """The hash that the hub reports for a file: SHA-256 for large objects, git's blob hash for others."""
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest() if is_large(path) else blob(content)


def entry(files: Path, path: Path) -> dict[str, Any]:
    """A file or folder as the hub's API describes it."""
    name = str(path.relative_to(files))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": blob(name.encode()), "size": 0}
    record = {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}
    if not is_large(path):
        return record
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{record['oid']}\nsize {record['size']}\n".encode()
    return {**record, "oid": blob(pointer), "lfs": {"oid": record["oid"], "size": record["size"], "pointerSize": len(pointer)}}

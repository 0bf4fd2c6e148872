"""The half of `Hub` that takes writes: what a repository holds besides the files of `main`, and how each request changes it."""

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
    """An answer that is no success, with what the client reads of one."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass(frozen=True)
class Repository:
    """The files of `main`, and the folder beside the served ones for its branches, its objects and whether it is private."""

    main: Path
    beside: Path

    @property
    def private(self) -> bool:
        return (self.beside / "private").exists()

    def branches(self) -> dict[str, Path]:
        return {"main": self.main} | {folder.name: folder for folder in sorted((self.beside / "branches").glob("*"))}

    def at(self, revision: str | None) -> Path:
        """The files of a branch, or of the branch that is at a commit."""
        for name, files in self.branches().items():
            if revision in (None, name) or revision == commit(files):
                return files
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def create(self, private: bool) -> None:
        """Made as the real hub makes one, which is not empty."""
        self.main.mkdir(parents=True)
        (self.main / ".gitattributes").write_text(f"*{LARGE} filter=lfs diff=lfs merge=lfs -text\n")
        self.beside.mkdir(parents=True)
        if private:
            (self.beside / "private").touch()

    def branch(self, name: str, start: str) -> None:
        if "/" in name:
            raise Refused(400, f"a branch is one folder here, so its name has no slash: {name}")
        if name in self.branches():
            raise Refused(409, "Reference already exists")
        shutil.copytree(self.at(start), self.beside / "branches" / name)

    def preupload(self, revision: str, paths: list[str]) -> list[dict[str, Any]]:
        """Which way each file is to take, and what is there now."""
        files = self.at(revision)
        ways = {path: "lfs" if path.endswith(LARGE) else "regular" for path in paths}
        now = {path: etag(files / path) if (files / path).is_file() else None for path in paths}
        return [{"path": path, "uploadMode": ways[path], "shouldIgnore": False, "oid": now[path]} for path in paths]

    def held(self, oid: str) -> Path:
        return self.beside / "objects" / oid

    def store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "the content is not the object's")
        self.held(oid).parent.mkdir(parents=True, exist_ok=True)
        self.held(oid).write_bytes(content)

    def commit(self, revision: str, lines: list[dict[str, Any]]) -> str:
        """Changes a copy of a branch and puts it in the branch's place, so that one refused line leaves everything as it was."""
        if (files := self.branches().get(revision)) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        self.beside.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.beside) as place:
            new = Path(place) / "new"
            shutil.copytree(files, new)
            for line in lines:
                self.change(new, line["key"], line["value"])
            files.rename(Path(place) / "old")
            new.rename(files)
        return commit(files)

    def change(self, files: Path, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            if not commit(files).startswith(value.get("parentCommit", "")):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            return
        path = files / value["path"]
        if ".." in path.parts or path == files:
            raise Refused(400, f"no path in a repository: {value['path']}")
        if key == "deletedFile" or key == "deletedFolder":
            if not (path.is_file() if key == "deletedFile" else path.is_dir()):
                raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            path.unlink() if key == "deletedFile" else shutil.rmtree(path)
            # git knows no empty folders.
            while (path := path.parent) != files and not any(path.iterdir()):
                path.rmdir()
        elif key == "file":
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if not self.held(value["oid"]).exists():
                raise Refused(400, f"an object that was never uploaded: {value['path']}")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.held(value["oid"]), path)
        else:
            raise Refused(400, f"no operation: {key}")


def checked(card: str) -> dict[str, Any]:
    """What is said of a README's metadata before it is uploaded."""
    start, *rest = f"{card}\n".split("---\n", 2)
    if start or len(rest) < 2:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    try:
        if isinstance(yaml.safe_load(rest[0]), dict):
            return {"errors": [], "warnings": []}
        message = "no mapping"
    except yaml.YAMLError as error:
        message = str(error)
    raise Refused(400, "Invalid metadata in README.md", errors=[{"message": message}], warnings=[])


def commit(files: Path) -> str:
    """One commit for a folder's names and contents."""
    named = ((path.relative_to(files), blob(path.read_bytes())) for path in sorted(files.rglob("*")) if path.is_file())
    return blob("".join(f"{name} {content}\n" for name, content in named).encode())


def blob(content: bytes) -> str:
    """Git's name for a file, which the client makes too."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def large(path: Path) -> bool:
    # The client uploads an empty file as a regular one whatever it is told.
    return path.suffix == LARGE and path.stat().st_size > 0


def etag(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content).hexdigest() if large(path) else blob(content)


def entry(files: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(files))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": blob(name.encode()), "size": 0}
    found = {"type": "file", "path": name, "oid": etag(path), "size": path.stat().st_size}
    if not large(path):
        return found
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{found['oid']}\nsize {found['size']}\n".encode()
    return {**found, "oid": blob(pointer), "lfs": {"oid": found["oid"], "size": found["size"], "pointerSize": len(pointer)}}

"""A Hugging Face hub on 127.0.0.1 that serves a folder of repositories, keeps a log of its requests and misbehaves when told to.

A client takes its endpoint from the environment when it is imported, so it runs in a process of its own, with `Hub.environment`.
"""

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<path>.*))?"
)
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Fault:
    """Something that goes wrong with requests for one part of the hub."""

    kind: Literal["error", "drop", "stall"]
    """Answer with `status`, cut the body in half, or never answer."""
    times: float = float("inf")
    """How many requests it befalls."""
    after: int = 0
    """How many go well before."""
    on: Literal["data", "api"] = "data"
    """The bodies of files, or everything else."""
    status: int = 500


@dataclass(frozen=True)
class Request:
    """What was asked for, and how it ended."""

    method: str
    path: str
    outcome: str


class Hub(ThreadingHTTPServer):
    """`folder/datasets/ORG/NAME` and `folder/models/ORG/NAME`, served until the `with` ends."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder = folder
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object):
        self.over.set()
        self.shutdown()
        self.server_close()

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """A client's environment: this hub, a cache of its own and nobody's account."""
        ours = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "NO_PROXY": "*",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        dropped = ("HF_", "HUGGING")
        return (
            {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | ours | {"HF_HUB_DISABLE_XET": "1"} | more
        )

    def fault(self, on: str) -> Fault | None:
        """What befalls the next request for a part, which is counted."""
        with self._lock:
            for fault in (fault for fault in self.faults if fault.on == on and fault.times > 0):
                if fault.after > 0:
                    fault.after -= 1
                    return None
                fault.times -= 1
                return fault
        return None

    def asked(self, outcome: str = "") -> list[str]:
        """The files whose bodies were asked for, in order."""
        found = [(RESOLVE.fullmatch(request.path), request) for request in self.log if request.method == "GET"]
        return [match["path"] for match, request in found if match and outcome in request.outcome]

    def handle_error(self, *_: object) -> None:
        """A client that is gone is none of the test's business."""


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def log_message(self, *_: object):
        pass

    def answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        path = unquote(url.path)
        file = RESOLVE.fullmatch(path)
        fault = self.server.fault("data" if file and self.command == "GET" else "api")
        self.server.log.append(Request(self.command, path, fault.kind if fault else "answered"))
        self.cut = fault is not None and fault.kind == "drop"
        if fault and fault.kind == "stall":
            self.server.over.wait()
        elif fault and fault.kind == "error":
            self.reply(fault.status, b"told to")
        elif file:
            self.resolve(file)
        elif api := API.fullmatch(path):
            self.api(api, parse_qs(url.query))
        else:
            self.reply(404, b"")

    def repository(self, match: re.Match[str]) -> Path | None:
        folder = self.server.folder / (match["kind"] or "models") / match["repo"]
        if not folder.is_dir():
            self.reply(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if match["revision"] not in (None, "main", commit(folder)):
            self.reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return None
        return folder

    def api(self, match: re.Match[str], query: dict[str, list[str]]) -> None:
        if (folder := self.repository(match)) is None:
            return
        if match["what"] == "tree":
            start = folder / match["path"].strip("/")
            inside = start.rglob("*") if query.get("recursive", ["false"])[0].lower() == "true" else start.glob("*")
            found: Any = [entry(folder, path) for path in sorted(inside)]
            if not start.is_dir():
                return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif match["what"] == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            found = [entry(folder, folder / path) for path in wanted if (folder / path).exists()]
        else:
            siblings = [{"rfilename": str(path.relative_to(folder))} for path in sorted(folder.rglob("*")) if path.is_file()]
            found = {"id": match["repo"], "sha": commit(folder), "private": False, "tags": [], "siblings": siblings}
        self.reply(200, json.dumps(found).encode(), {"Content-Type": "application/json"})
        return None

    def resolve(self, match: re.Match[str]) -> None:
        if (folder := self.repository(match)) is None:
            return
        if not (file := folder / match["path"]).is_file():
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(folder)})
        content = file.read_bytes()
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit(folder), "Accept-Ranges": "bytes"}
        first, last, status = 0, len(content) - 1, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(asked[1]), min(last, int(asked[2] or last)), 206
            if first > last:
                return self.reply(416, b"")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.reply(status, content[first : last + 1], headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.close_connection = self.close_connection or self.cut
        if self.cut and (self.command == "HEAD" or len(body) < 2):
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)


def commit(folder: Path) -> str:
    """One commit for a folder's names and sizes."""
    return digest("".join(f"{path.relative_to(folder)} {path.stat().st_size}\n" for path in sorted(folder.rglob("*"))).encode())


def entry(folder: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": digest(name.encode()), "size": 0}
    return {"type": "file", "path": name, "oid": digest(path.read_bytes()), "size": path.stat().st_size}


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()

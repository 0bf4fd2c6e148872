"""A Hugging Face hub on 127.0.0.1 that serves a folder of repositories, keeps a log of its requests and misbehaves when told to.

With a token it takes writes to models, which tests/hub_writes.py makes.

A client takes its endpoint from the environment when it is imported, so it runs in a process of its own, with `Hub.environment`.
"""

import json
import os
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub_writes import Refused, Repository, checked, commit, entry, etag, large

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<path>.*))?"
)
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
WRITE = re.compile(r"/(?:api/models/)?(?P<repo>[^/]+/[^/]+?)(?:\.git/info)?/(?P<what>preupload|commit|branch|lfs/objects)/(?P<name>.+)")
USER = "someone"

Reply = tuple[int, bytes, dict[str, str]]


@dataclass
class Fault:
    """Something that goes wrong with requests for one part of the hub."""

    kind: Literal["error", "drop", "stall"]
    """Answer with `status`, cut the body in half, or never answer; of an upload or a commit it is the request's body that is cut."""
    times: float = float("inf")
    """How many requests it befalls."""
    after: int = 0
    """How many go well before."""
    on: Literal["data", "api", "upload", "commit"] = "data"
    """The bodies of files that are read, what is put into the store of large files, the commits, or everything else."""
    status: int = 500


@dataclass(frozen=True)
class Request:
    """What was asked for, and how it ended."""

    method: str
    path: str
    outcome: str


class Hub(ThreadingHTTPServer):
    """`folder/datasets/ORG/NAME` and `folder/models/ORG/NAME`, served until the `with` ends.

    Whoever has `token` may write, and read what is private; without one nobody may. `folder/beside` holds what is in no `main`.
    """

    daemon_threads = True

    def __init__(self, folder: Path, token: str | None = None):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.token = folder, token
        self.granted: set[str] = set()
        # Whoever reads while a commit is made sees all of it or nothing.
        self.turn = threading.Lock()
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

    def do_PUT(self):
        self.answer()

    def log_message(self, *_: object):
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        file, write = RESOLVE.fullmatch(path), WRITE.fullmatch(path) if self.command in ("POST", "PUT") else None
        part = "upload" if self.command == "PUT" else "commit" if write and write["what"] == "commit" else "api"
        fault = self.server.fault("data" if file and self.command == "GET" else part)
        self.server.log.append(Request(self.command, path, fault.kind if fault else "answered"))
        self.cut = fault is not None and fault.kind == "drop"
        length, sent = int(self.headers.get("Content-Length", 0)), part != "api"
        self.body = self.rfile.read(length // 2 if self.cut and sent else length)
        if self.cut and sent:
            self.close_connection = True
        elif fault and fault.kind == "stall":
            self.server.over.wait()
        elif fault and fault.kind == "error":
            self.reply(fault.status, b'{"error": "told to"}', {})
        else:
            try:
                with self.server.turn:
                    reply = self.resolve(file) if file else self.told(200, self.ask(path, parse_qs(url.query), write))
            except Refused as refused:
                reply = self.told(refused.status, refused.body, refused.headers)
            self.reply(*reply)

    def told(self, status: int, found: Any, headers: dict[str, str] | None = None) -> Reply:
        return status, json.dumps(found).encode(), {"Content-Type": "application/json", **(headers or {})}

    def ask(self, path: str, query: dict[str, list[str]], write: re.Match[str] | None) -> Any:
        if write:
            return self.write(write)
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        if path == "/api/validate-yaml":
            return checked(json.loads(self.body)["content"])
        if path == "/api/whoami-v2":
            self.allow(write=True)
            return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}
        if api := API.fullmatch(path):
            return self.api(api, query)
        raise Refused(404, "Not found")

    def allow(self, write: bool = False, code: str = "") -> bool:
        """Whether the request has the token; one that is wrong is refused, and so is none where one is needed."""
        given, token = self.headers.get("Authorization"), self.server.token
        if given is not None and token is not None and given != f"Bearer {token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if write and given is None:
            raise Refused(401, "Invalid username or password.", code)
        if write and token is None:
            raise Refused(403, "You don't have the rights to write here")
        return given is not None and token is not None

    def repository(self, kind: str | None, name: str) -> Repository:
        kind = (kind or "models").strip("/")
        return Repository(self.server.folder / kind / name, self.server.folder / "beside" / kind / name)

    def found(self, kind: str | None, name: str, write: bool = False) -> Repository:
        # The code is what the client makes of this answer itself where it comes by https.
        allowed, repository = self.allow(write, "RepoNotFound"), self.repository(kind, name)
        if not repository.main.is_dir() or (repository.private and not allowed):
            # The real hub tells strangers nothing of what is private.
            raise Refused(404 if allowed else 401, "Repository not found", "RepoNotFound")
        return repository

    def create(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self.allow(write=True)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        place, repository = {"url": f"http://{self.headers['Host']}/{name}"}, self.repository("models", name)
        if wanted.get("type", "model") != "model":
            raise Refused(400, "only models are created here")
        if repository.main.exists():
            raise Refused(409, "You already created this model repo", **place)
        # Older clients say it the second way.
        repository.create(private=wanted.get("visibility") == "private" or wanted.get("private") is True)
        return place

    def write(self, match: re.Match[str]) -> dict[str, Any]:
        what, name = match["what"], match["name"]
        if self.command == "PUT":
            # No token comes with it: the batch before it gave this place out, as a signed address does.
            if self.path not in self.server.granted:
                raise Refused(403, "Forbidden")
            self.repository("models", match["repo"]).store(name, self.body)
            return {}
        repository = self.found("models", match["repo"], write=True)
        if what == "commit":
            made = repository.commit(name, [json.loads(line) for line in self.body.splitlines()])
            return {"success": True, "commitOid": made, "commitUrl": f"http://{self.headers['Host']}/{match['repo']}/commit/{made}"}
        wanted = json.loads(self.body)
        if what == "branch":
            repository.branch(name, wanted.get("startingPoint", "main"))
            return {}
        if what == "preupload":
            return {"files": repository.preupload(name, [file["path"] for file in wanted["files"]])}
        objects = [{"oid": one["oid"], "size": one["size"]} for one in wanted["objects"]]
        for one in (one for one in objects if not repository.held(one["oid"]).exists()):
            place = f"/{match['repo']}.git/info/lfs/objects/{one['oid']}"
            self.server.granted.add(place)
            one["actions"] = {"upload": {"href": f"http://{self.headers['Host']}{place}"}}
        return {"transfer": "basic", "objects": objects}

    def api(self, match: re.Match[str], query: dict[str, list[str]]) -> Any:
        repository = self.found(match["kind"], match["repo"])
        files = repository.at(match["revision"])
        if match["what"] == "tree":
            start = files / match["path"].strip("/")
            if not start.is_dir():
                raise Refused(404, "Entry not found", "EntryNotFound")
            inside = start.rglob("*") if query.get("recursive", ["false"])[0].lower() == "true" else start.glob("*")
            return [entry(files, path) for path in sorted(inside)]
        if match["what"] == "paths-info":
            wanted = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            return [entry(files, files / path) for path in wanted if (files / path).exists()]
        siblings = [{"rfilename": str(path.relative_to(files))} for path in sorted(files.rglob("*")) if path.is_file()]
        return {"id": match["repo"], "sha": commit(files), "private": repository.private, "tags": [], "siblings": siblings}

    def resolve(self, match: re.Match[str]) -> Reply:
        files = self.found(match["kind"], match["repo"]).at(match["revision"])
        if not (file := files / match["path"]).is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(files)}
        content, tag = file.read_bytes(), f'"{etag(file)}"'
        headers = {"ETag": tag, "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
        if large(file):
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(content))}
        first, last, status = 0, len(content) - 1, 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(asked[1]), min(last, int(asked[2] or last)), 206
            if first > last:
                return 416, b"", {}
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return status, content[first : last + 1], headers

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.close_connection = self.close_connection or self.cut
        if self.cut and (self.command == "HEAD" or len(body) < 2):
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.cut else body)

"""A Hugging Face hub on 127.0.0.1 that serves a folder of repositories, logs its requests, and fails by its list of faults.

Clients with the token may write to models; tests/helpers/hub_writes.py applies the writes.

A client reads its endpoint from the environment when it is imported, so it runs in a process of its own, with `Hub.environment`.
"""

import json
import os
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.helpers.hub_writes import Refused, Repository, check_card, commit, entry, etag, is_large
from tests.helpers.local_server import LocalServer

API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)(?:/(?P<action>revision|tree|paths-info)/(?P<revision>[^/]+)(?P<path>.*))?"
)
RESOLVE = re.compile(r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
WRITE = re.compile(r"/(?:api/models/)?(?P<repo>[^/]+/[^/]+?)(?:\.git/info)?/(?P<action>preupload|commit|branch|lfs/objects)/(?P<name>.+)")
USER = "someone"

Reply = tuple[int, bytes, dict[str, str]]


@dataclass
class Fault:
    """A failure of requests to one part of the hub."""

    kind: Literal["error", "drop", "stall"]
    """`error`: answer with `status`. `drop`: cut the body in half (the request's, for uploads and commits). `stall`: never answer."""
    times: float = float("inf")
    """Number of requests that fail."""
    after: int = 0
    """Number of requests that succeed before the first failure."""
    on: Literal["data", "api", "upload", "commit"] = "data"
    """`data`: downloads of file bodies. `upload`: uploads of large objects. `commit`: commits. `api`: all other requests."""
    status: int = 500


@dataclass(frozen=True)
class Request:
    """A logged request: the method, the path, and the fault or `answered`."""

    method: str
    path: str
    outcome: str


class Hub(LocalServer):
    """Serves `folder/datasets/ORG/NAME` and `folder/models/ORG/NAME` until the `with` block ends.

    A client with `token` may write and read private repositories; with `token=None` nobody may. Branches and large objects are in
    `folder/internal`.
    """

    def __init__(self, folder: Path, token: str | None = None):
        super().__init__(Answer)
        self.folder, self.token = folder, token
        self.signed_paths: set[str] = set()
        # One request at a time: a client that reads during a commit sees all of it or nothing.
        self.one_at_a_time = threading.Lock()
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self._lock = threading.Lock()

    def environment(self, home: Path, **changes: str) -> dict[str, str]:
        """Environment variables for a client of this hub, with a cache folder of its own and without an account."""
        own_variables = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(home),
            "NO_PROXY": "*",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        dropped = ("HF_", "HUGGING")
        return (
            {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
            | own_variables
            | {"HF_HUB_DISABLE_XET": "1"}
            | changes
        )

    def fault(self, on: str) -> Fault | None:
        """The fault, if any, of the next request to a part of the hub; the request is counted."""
        with self._lock:
            for fault in (fault for fault in self.faults if fault.on == on and fault.times > 0):
                if fault.after > 0:
                    fault.after -= 1
                    return None
                fault.times -= 1
                return fault
        return None

    def downloads(self, outcome: str = "") -> list[str]:
        """The paths of downloaded files, in order of the requests, with the given outcome."""
        requests = [(RESOLVE.fullmatch(request.path), request) for request in self.log if request.method == "GET"]
        return [match["path"] for match, request in requests if match and outcome in request.outcome]


class Answer(BaseHTTPRequestHandler):
    """Answers one request, or fails with a fault of the hub."""

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
        part = "upload" if self.command == "PUT" else "commit" if write and write["action"] == "commit" else "api"
        fault = self.server.fault("data" if file and self.command == "GET" else part)
        self.server.log.append(Request(self.command, path, fault.kind if fault else "answered"))
        self.cut = fault is not None and fault.kind == "drop"
        length, sent = int(self.headers.get("Content-Length", 0)), part != "api"
        self.body = self.rfile.read(length // 2 if self.cut and sent else length)
        if self.cut and sent:
            self.close_connection = True
        elif fault and fault.kind == "stall":
            self.server.is_closed.wait()
        elif fault and fault.kind == "error":
            self.reply(fault.status, b'{"error": "a fault of the test"}', {})
        else:
            try:
                with self.server.one_at_a_time:
                    reply = self.resolve(file) if file else self.json_reply(200, self.answer_json(path, parse_qs(url.query), write))
            except Refused as refused:
                reply = self.json_reply(refused.status, refused.body, refused.headers)
            self.reply(*reply)

    def json_reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> Reply:
        return status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}

    def answer_json(self, path: str, query: dict[str, list[str]], write: re.Match[str] | None) -> Any:
        if write:
            return self.write(write)
        if path == "/api/repos/create":
            return self.create(json.loads(self.body))
        if path == "/api/validate-yaml":
            return check_card(json.loads(self.body)["content"])
        if path == "/api/whoami-v2":
            self.allow(write=True)
            return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}
        if api := API.fullmatch(path):
            return self.api(api, query)
        raise Refused(404, "Not found")

    def allow(self, write: bool = False, code: str = "") -> bool:
        """Whether the request has the token. A wrong token is refused, and a write without one."""
        header, token = self.headers.get("Authorization"), self.server.token
        if header is not None and token is not None and header != f"Bearer {token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if write and header is None:
            raise Refused(401, "Invalid username or password.", code)
        if write and token is None:
            raise Refused(403, "You don't have the rights to write here")
        return header is not None and token is not None

    def repository(self, kind: str | None, name: str) -> Repository:
        kind = (kind or "models").strip("/")
        return Repository(self.server.folder / kind / name, self.server.folder / "internal" / kind / name)

    def existing(self, kind: str | None, name: str, write: bool = False) -> Repository:
        """The repository, if it exists and the client may see it."""
        # Over https the client derives this code itself.
        allowed, repository = self.allow(write, "RepoNotFound"), self.repository(kind, name)
        if not repository.main.is_dir() or (repository.private and not allowed):
            # The real hub does not tell others that a private repository exists.
            raise Refused(404 if allowed else 401, "Repository not found", "RepoNotFound")
        return repository

    def create(self, request: dict[str, Any]) -> dict[str, Any]:
        """Create a repository of models."""
        self.allow(write=True)
        name = f"{request.get('organization') or USER}/{request['name']}"
        address, repository = {"url": f"http://{self.headers['Host']}/{name}"}, self.repository("models", name)
        if request.get("type", "model") != "model":
            raise Refused(400, "only models are created here")
        if repository.main.exists():
            raise Refused(409, "You already created this model repo", **address)
        # Older clients send `private`.
        repository.create(private=request.get("visibility") == "private" or request.get("private") is True)
        return address

    def write(self, match: re.Match[str]) -> dict[str, Any]:
        action, name = match["action"], match["name"]
        if self.command == "PUT":
            # An upload has no token: like a signed address, its path was given out in the answer to an authorised request.
            if self.path not in self.server.signed_paths:
                raise Refused(403, "Forbidden")
            self.repository("models", match["repo"]).store_object(name, self.body)
            return {}
        repository = self.existing("models", match["repo"], write=True)
        if action == "commit":
            new_commit = repository.commit(name, [json.loads(line) for line in self.body.splitlines()])
            return {
                "success": True,
                "commitOid": new_commit,
                "commitUrl": f"http://{self.headers['Host']}/{match['repo']}/commit/{new_commit}",
            }
        request = json.loads(self.body)
        if action == "branch":
            repository.create_branch(name, request.get("startingPoint", "main"))
            return {}
        if action == "preupload":
            return {"files": repository.preupload(name, [file["path"] for file in request["files"]])}
        objects = [{"oid": item["oid"], "size": item["size"]} for item in request["objects"]]
        for item in (item for item in objects if not repository.object_path(item["oid"]).exists()):
            path = f"/{match['repo']}.git/info/lfs/objects/{item['oid']}"
            self.server.signed_paths.add(path)
            item["actions"] = {"upload": {"href": f"http://{self.headers['Host']}{path}"}}
        return {"transfer": "basic", "objects": objects}

    def api(self, match: re.Match[str], query: dict[str, list[str]]) -> Any:
        repository = self.existing(match["kind"], match["repo"])
        files = repository.at(match["revision"])
        if match["action"] == "tree":
            start = files / match["path"].strip("/")
            if not start.is_dir():
                raise Refused(404, "Entry not found", "EntryNotFound")
            inside = start.rglob("*") if query.get("recursive", ["false"])[0].lower() == "true" else start.glob("*")
            return [entry(files, path) for path in sorted(inside)]
        if match["action"] == "paths-info":
            paths = parse_qs(self.body.decode()).get("paths") or json.loads(self.body)["paths"]
            return [entry(files, files / path) for path in paths if (files / path).exists()]
        siblings = [{"rfilename": str(path.relative_to(files))} for path in sorted(files.rglob("*")) if path.is_file()]
        return {"id": match["repo"], "sha": commit(files), "private": repository.private, "tags": [], "siblings": siblings}

    def resolve(self, match: re.Match[str]) -> Reply:
        files = self.existing(match["kind"], match["repo"]).at(match["revision"])
        if not (file := files / match["path"]).is_file():
            return 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit(files)}
        content, tag = file.read_bytes(), f'"{etag(file)}"'
        headers = {"ETag": tag, "X-Repo-Commit": commit(files), "Accept-Ranges": "bytes"}
        if is_large(file):
            headers |= {"X-Linked-Etag": tag, "X-Linked-Size": str(len(content))}
        first, last, status = 0, len(content) - 1, 200
        if requested_range := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(requested_range[1]), min(last, int(requested_range[2] or last)), 206
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

"""A server of OpenAI's chat interface on 127.0.0.1. It answers by a function, logs its requests, and fails by its list of faults."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal

from tests.helpers.local_server import LocalServer

MODEL = "small-judge"


@dataclass
class Fault:
    """A failure of the next `times` requests."""

    kind: Literal["error", "truncated", "cut", "hang", "page", "nested", "empty", "refusal", "no_choices", "unpaid"]
    """`error`: answer with `status`. `truncated`: half of a JSON body. `cut`: close the connection in the middle of the body. `hang`: never
    answer. `page`: a web page. `nested`: a JSON body of 100,000 brackets. `empty`, `refusal`, `no_choices`: a paid reply without text,
    with a refusal in place of it, without a message. `unpaid`: an empty reply that counts no tokens."""
    times: float = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict[str, str])
    message: str = "a fault of the test"


@dataclass(frozen=True)
class Request:
    """A logged request: its JSON body, its headers by names in lower case, and the fault or `answered`."""

    body: dict[str, Any]
    headers: dict[str, str]
    outcome: str

    @property
    def user(self) -> str:
        """The text of the user's message."""
        return self.body["messages"][1]["content"]


class ChatAPI(LocalServer):
    """Answers chats for one model until the `with` block ends.

    `answer` maps a request's body to what the model writes. `logprobs` are pairs of a token and its log-probability; with `None` the server
    refuses the parameter. `before` is called at each request, before it is answered. With a `key`, requests need it.
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str] = lambda body: "yes",
        *,
        logprobs: list[tuple[str, float]] | None = None,
        key: str | None = None,
        before: Callable[[], object] = lambda: None,
    ):
        super().__init__(Chat)
        self.answer, self.logprobs, self.key, self.before = answer, logprobs, key, before
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address of the interface."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def requests(self, outcome: str = "") -> list[Request]:
        """The logged requests with the given outcome."""
        return [request for request in self.log if outcome in request.outcome]


class Chat(BaseHTTPRequestHandler):
    """Answers one request, or fails with a fault of the server."""

    server: ChatAPI
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object):
        pass

    def do_POST(self):
        api = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        api.before()
        with api.lock:
            fault = next((fault for fault in api.faults if fault.times > 0), None)
            if fault:
                fault.times -= 1
            api.log.append(
                Request(body, {name.lower(): value for name, value in self.headers.items()}, fault.kind if fault else "answered")
            )
        if fault:
            return self.fail(fault)
        if api.key is not None and self.headers.get("Authorization") != f"Bearer {api.key}":
            return self.error(401, f"Incorrect API key provided: {self.headers.get('Authorization')}")
        if self.path != "/v1/chat/completions":
            return self.error(404, "no such page")
        if body["model"] != MODEL:
            return self.error(404, f"The model {body['model']} does not exist")
        if "logprobs" in body and api.logprobs is None:
            return self.error(400, "logprobs are not supported")
        self.reply(200, json.dumps(self.completion(body, api.answer(body))).encode())

    def completion(self, body: dict[str, Any], words: str) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": words},
            "finish_reason": "stop",
        }
        if body.get("logprobs"):
            tokens = [{"token": token, "logprob": value, "bytes": None} for token, value in self.server.logprobs or []]
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens}]}
        usage = {"prompt_tokens": 90, "completion_tokens": 10, "total_tokens": 100}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice], "usage": usage}

    def fail(self, fault: Fault) -> None:
        whole = json.dumps(self.completion({"model": MODEL}, "yes")).encode()
        if fault.kind == "error":
            self.error(fault.status, fault.message, fault.headers)
        elif fault.kind == "hang":
            self.server.is_closed.wait()
        elif fault.kind == "cut":
            self.reply(200, whole[: len(whole) // 2], length=len(whole))
            self.close_connection = True
        elif fault.kind == "page":
            self.reply(200, b"<html>Welcome</html>", kind="text/html")
        elif fault.kind in ("empty", "refusal", "no_choices", "unpaid"):
            self.reply(200, json.dumps(self.without_text(fault.kind)).encode())
        else:
            self.reply(200, whole[: len(whole) // 2] if fault.kind == "truncated" else b"[" * 100_000)

    def without_text(self, kind: str) -> dict[str, Any]:
        completion = self.completion({"model": MODEL}, "")
        if kind == "refusal":
            completion["choices"][0]["message"] |= {"content": None, "refusal": "I cannot help with that."}
        elif kind == "no_choices":
            completion["choices"] = []
        elif kind == "unpaid":
            del completion["usage"]
        return completion

    def error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.reply(status, json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode(), headers=headers)

    def reply(
        self, status: int, body: bytes, *, headers: dict[str, str] | None = None, length: int | None = None, kind: str = "application/json"
    ) -> None:
        self.send_response(status)
        sizes = {"Content-Type": kind, "Content-Length": str(len(body) if length is None else length)}
        for name, value in {**sizes, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

"""The application of `metasae serve`: its answers, and the requests that it refuses."""

import socket
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metasae_lightning.cli import main
from metasae_lightning.cli.serve import listening_socket
from metasae_lightning.errors import InputError
from metasae_lightning.server.typed_text import ServedSAEs

pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")

from metasae_lightning.server.application import MAX_BODY, application, is_own_host  # noqa: E402


class Answers(ServedSAEs):
    """Says what it was asked, and how many requests it works on at once."""

    at_once: list[int]
    inside: list[str]

    def __init__(self) -> None:
        vars(self).update(at_once=[], inside=[])

    def description(self) -> dict[str, Any]:
        return {"model": "<b>m</b>"}

    def firings(self, text: str) -> dict[str, Any]:
        self.inside.append(text)
        self.at_once.append(len(self.inside))
        if text == "wait":  # long enough for a second request to come in, were it let in
            time.sleep(0.1)
        self.inside.pop()
        if text == "bad":
            raise InputError("text is bad")
        return {"text": text, "value": float("nan")}

    def continuations(self, text: str, arm: str, latent: int, strength: float, count: int) -> dict[str, Any]:
        return {"text": text, "arm": arm, "latent": latent, "strength": strength, "count": count}


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def client(answers: Answers) -> Iterator[Any]:
    with testclient.TestClient(application(answers, "127.0.0.1"), base_url="http://127.0.0.1:8765") as client:
        yield client


def test_the_page_may_load_nothing_from_elsewhere(client: Any):
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        reply = client.get(path)
        assert reply.status_code == 200 and reply.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in reply.headers["content-security-policy"] and "//" not in reply.text.replace("  //", "").replace(
            "\n//", ""
        )
    assert "innerHTML" not in client.get("/page.js").text


def test_answers_are_json(client: Any):
    assert client.get("/description").json() == {"model": "<b>m</b>"}
    reply = client.post("/firings", json={"text": "é"})
    assert (reply.status_code, reply.json()) == (200, {"text": "é", "value": None}) and reply.headers["x-content-type-options"] == "nosniff"
    arguments = {"text": "a", "arm": "b", "latent": 1, "strength": -2, "count": 3}
    assert client.post("/continuations", json=arguments).json() == arguments


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8765", 200), ("localhost:8765", 200), ("[::1]:8765", 200), ("rebound.example", 421), ("10.0.0.1:8765", 421), ("[", 421)],
)
def test_a_request_for_another_host_is_refused(client: Any, answers: Answers, host: str, status: int):
    assert client.get("/", headers={"Host": host}).status_code == status
    assert client.post("/firings", json={"text": "a"}, headers={"Host": host}).status_code == status
    assert len(answers.at_once) == (status == 200)


@pytest.mark.parametrize(
    ("header", "host", "is_own"),
    [
        ("box.example:80", "box.example", True),
        ("BOX.example", "Box.Example", True),
        ("other.example", "box.example", False),
        ("10.0.0.2", "10.0.0.1", False),
        ("10.0.0.2:80", "0.0.0.0", True),
        ("localhost", "0.0.0.0", True),
        ("rebound.example", "0.0.0.0", False),
        ("rebound.example", "::", False),
        ("", "127.0.0.1", False),
        ("127.0.0.1.rebound.example", "127.0.0.1", False),
    ],
)
def test_a_host_header_names_the_address(header: str, host: str, is_own: bool):
    assert is_own_host(header, host) == is_own


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b'{"text": "a"}', "text/plain", 415, "must be application/json"),
        (b'{"text": "a"}', "application/x-www-form-urlencoded", 415, "must be application/json"),
        (b"{", "application/json", 400, "not JSON"),
        (b"\xff", "application/json", 400, "not JSON"),
        (b"[" * 100_000, "application/json", 400, "not JSON"),
        (b"[1]", "application/json", 400, "no JSON object"),
        (b'{"text": "' + b"a" * MAX_BODY + b'"}', "application/json", 413, f"at most {MAX_BODY} bytes"),
        (b'{"text": 1}', "application/json", 400, "text must be a text"),
        (b"{}", "application/json", 400, "the arguments are text, got none"),
        (b'{"text": "a", "more": 1}', "application/json", 400, "the arguments are text, got text, more"),
        (b'{"text": "bad"}', "application/json; charset=utf-8", 400, "text is bad"),
    ],
)
def test_a_bad_request_is_refused_with_its_reason(client: Any, content: bytes, kind: str, status: int, message: str):
    reply = client.post("/firings", content=content, headers={"Content-Type": kind})
    assert reply.status_code == status and message in reply.json()["error"]


@pytest.mark.parametrize(("name", "value"), [("latent", True), ("latent", 1.5), ("strength", "3"), ("count", None), ("arm", ["a"])])
def test_an_argument_of_another_type_is_refused(client: Any, name: str, value: Any):
    arguments = {"text": "a", "arm": "b", "latent": 1, "strength": 2.5, "count": 3, name: value}
    reply = client.post("/continuations", json=arguments)
    assert reply.status_code == 400 and f"{name} must be" in reply.json()["error"]


def test_other_methods_and_paths_are_refused(client: Any):
    assert client.get("/firings").status_code == 405 and client.post("/", json={}).status_code == 405
    assert client.get("/page.py").status_code == client.get("/..%2fapplication.py").status_code == 404


def test_the_model_works_on_one_request_at_a_time(client: Any, answers: Answers):
    threads = [threading.Thread(target=client.post, args=("/firings",), kwargs={"json": {"text": "wait"}}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.at_once == [1, 1, 1]


def test_an_address_that_cannot_be_used_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"cannot listen at 127\.0\.0\.1, port .* in use"):
        listening_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="port must be in 0 to 65535, got 65536"):
        listening_socket("127.0.0.1", 65536)
    with pytest.raises(InputError, match=r"host and port: cannot listen at 192\.0\.2\.1"):
        listening_socket("192.0.2.1", 0)


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)])
def test_the_command_says_where_it_is_and_who_can_read_it(
    host: str, warns: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupt(*_: Any, sockets: list[Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metasae_lightning.cli.serve.served_saes", lambda args: Namespace(saes={"solo": 1, "joint": 2}))
    monkeypatch.setattr("uvicorn.Server", lambda config: Namespace(run=interrupt))
    monkeypatch.setattr("metasae_lightning.server.application.application", lambda served, host: None)
    assert main(["serve", "runs/a", "--host", host, "--port", "0"]) == 0
    text = capsys.readouterr().out
    assert ("everybody who can reach port" in text) == warns
    assert f"http://{host}:" in text and "/ shows solo, joint; Ctrl-C ends it" in text


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "metasae: error: serve needs starlette and uvicorn: pip install 'metasae-lightning[serve]'\n"

"""The web application of `metasae serve`: one page, and two JSON requests for the language model, which are answered one at a time."""

import asyncio
import ipaddress
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from metasae_lightning.errors import InputError
from metasae_lightning.run_folder import null_non_finite
from metasae_lightning.server.typed_text import ServedSAEs

HERE = Path(__file__).parent
# Bytes of a request's body at most: enough for the longest text with each character escaped in JSON.
MAX_BODY = 2**17
# The page may load only its own script and style, and send requests only to this server.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def application(served: ServedSAEs, host: str) -> Starlette:
    """The ASGI application. `host` is the address that it is served at."""
    turn = asyncio.Lock()

    def answer(function: Callable[..., dict[str, Any]], **types: type) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            arguments = arguments_of(await json_of(request), types)
            async with turn:
                found = await run_in_threadpool(function, **arguments)
            return JSONResponse(null_non_finite(found), headers=HEADERS)

        return endpoint

    async def description(_: Request) -> Response:
        return JSONResponse(served.description(), headers=HEADERS)

    return Starlette(
        routes=[
            Route("/", page_file("page.html", "text/html")),
            Route("/page.js", page_file("page.js", "text/javascript")),
            Route("/page.css", page_file("page.css", "text/css")),
            Route("/description", description),
            Route("/firings", answer(served.firings, text=str), methods=["POST"]),
            Route(
                "/continuations",
                answer(served.continuations, text=str, arm=str, latent=int, strength=float, count=int),
                methods=["POST"],
            ),
        ],
        middleware=[Middleware(OwnHostOnly, host=host)],
        exception_handlers={InputError: input_error, HTTPException: refusal},
    )


def page_file(name: str, kind: str) -> Callable[[Request], Any]:
    """The endpoint of one of the page's files."""
    content = (HERE / name).read_bytes()

    async def endpoint(_: Request) -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return endpoint


async def json_of(request: Request) -> dict[str, Any]:
    """The JSON object in a body of at most `MAX_BODY` bytes. A page of another site cannot send JSON, because CORS forbids it."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "the content type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY} bytes")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body is not JSON") from error
    if not isinstance(content, dict):
        raise HTTPException(400, "the body is no JSON object")
    return content


def arguments_of(content: dict[str, Any], types: dict[str, type]) -> dict[str, Any]:
    """The named arguments in a JSON object; an `InputError` for one that is missing, unknown or of another type.

    >>> arguments_of({"latent": 3, "strength": 2}, {"latent": int, "strength": float})
    {'latent': 3, 'strength': 2}
    """
    if content.keys() != types.keys():
        raise InputError(f"the arguments are {', '.join(types)}, got {', '.join(map(str, content)) or 'none'}")
    for name, wanted in types.items():
        value = content[name]
        if isinstance(value, bool) or not isinstance(value, (int, float) if wanted is float else wanted):
            raise InputError(f"{name} must be {'a text' if wanted is str else 'a number' if wanted is float else 'a whole number'}")
    return content


async def input_error(_: Request, error: Exception) -> Response:
    """The message of an `InputError` as JSON."""
    return JSONResponse({"error": str(error)}, 400, headers=HEADERS)


async def refusal(_: Request, error: Exception) -> Response:
    """The reason of an `HTTPException` as JSON."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=HEADERS)


class OwnHostOnly:
    """Middleware that refuses requests with another Host header, against DNS rebinding.

    A page of another site could otherwise read the answers, by making its own host name resolve to this address.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app = app
        self.host = host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and not is_own_host(Request(scope).headers.get("host", ""), self.host):
            await JSONResponse({"error": "this host is not served here"}, 421, headers=HEADERS)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def is_own_host(header: str, host: str) -> bool:
    """Whether a Host header names the address `host`, with any port.

    For a loopback address, the header may be any loopback address or localhost. For all addresses at once (0.0.0.0), it may be any
    address or localhost. It is never another name, because that can belong to another site.

    >>> is_own_host("localhost:8000", "127.0.0.1"), is_own_host("rebound.example:8000", "127.0.0.1"), is_own_host("10.0.0.7", "0.0.0.0")
    (True, False, True)
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if name == host.lower():
        return True
    called, served = address_of(name), address_of(host)
    if served is None or called is None:
        return False
    return (served.is_loopback and called.is_loopback) or served.is_unspecified


def address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The IP address in a host name, where localhost is 127.0.0.1; None for any other name.

    >>> address_of("localhost"), address_of("example.org")
    (IPv4Address('127.0.0.1'), None)
    """
    try:
        return ipaddress.ip_address("127.0.0.1" if name.lower() == "localhost" else name)
    except ValueError:
        return None

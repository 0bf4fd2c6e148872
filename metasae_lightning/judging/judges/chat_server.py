"""A server with OpenAI's chat interface: failed requests are repeated, and a budget ends them. Only this module imports `openai`."""

import email.utils
import logging
import math
import os
import threading
import time
from dataclasses import replace
from typing import Any, final
from urllib.parse import urlsplit

from metasae_lightning.errors import InputError, one_line
from metasae_lightning.judging.judges.chat_reply import BadReply, Reply, read_reply
from metasae_lightning.judging.judges.prompts import Messages
from metasae_lightning.judging.judges.questions import Cost
from metasae_lightning.redaction import redact

# Longest wait before a request is sent again, in seconds. If the server asks for a longer wait, the run ends.
LONGEST_WAIT = 300.0
# Log-probabilities that are asked for at each token.
TOP_LOGPROBS = 10
# Statuses after which the same request may succeed.
TRANSIENT = {408, 409, 425, 429}

log = logging.getLogger(__name__)


class BudgetExhausted(InputError):
    """The limit of requests or of tokens is reached."""


class QuestionRefused(Exception):
    """The server refuses one question, such as one that is too long for its model."""


@final
class ChatServer:
    """One model of a server. Several threads may use it at the same time. `cost` counts every request that is sent.

    Its errors hold neither the key nor an exception of `openai`, because such an exception holds the key.
    """

    def __init__(
        self,
        model: str,
        url: str,
        *,
        key_variable: str,
        timeout: float,
        retries: int,
        backoff: float,
        max_requests: int | None,
        max_tokens: int | None,
        cost: Cost,
    ) -> None:
        self.model, self.url, self.key_variable, self.cost = model, public_url(url), key_variable, cost
        self.retries, self.backoff, self.max_requests, self.max_tokens = retries, backoff, max_requests, max_tokens
        self.stopped = threading.Event()
        self._secrets = [secret for secret in (read_key(key_variable), urlsplit(url).username, urlsplit(url).password) if secret]
        key = read_key(key_variable)
        self._openai, self._client = open_client(url, key, timeout)
        # Without a key, the client would send a made-up one.
        self._headers = {} if key else {"Authorization": self._openai.Omit()}
        self._lock = threading.Lock()
        # Parameters of requests that this server has refused.
        self._left_out: set[str] = set()

    def reply(self, messages: Messages, length: int, *, logprobs: bool) -> Reply:
        """The reply to messages, of at most `length` tokens.

        It raises `QuestionRefused` for a refused question, `BudgetExhausted`, or `InputError` for a server that cannot be used.
        """
        attempt = 0
        while True:
            parameters = self._parameters(length, logprobs=logprobs)
            reply = self._send(messages, parameters)
            if isinstance(reply, Reply):
                return reply
            said, status, wait = reply
            if status in (400, 422) and self._leave_out(said, parameters):
                continue
            self._raise_if_final(said, status)
            attempt += 1
            if attempt > self.retries:
                raise InputError(f"url: {self.url} gave no answer in {attempt} tries: {said}")
            if wait is not None and wait > LONGEST_WAIT:
                raise InputError(f"url: {self.url} asks to wait {wait:.0f} seconds: {said}")
            if self.stopped.wait(min(self.backoff * 2 ** (attempt - 1), LONGEST_WAIT) if wait is None else wait):
                raise InputError(f"url: {self.url} was not asked again, because another request failed: {said}")

    def _parameters(self, length: int, *, logprobs: bool) -> dict[str, Any]:
        """The parameters of a request, apart from model and messages, without those that the server has refused."""
        asked: dict[str, Any] = {"temperature": 0}
        # The newer name of the same limit; OpenAI's reasoning models know no other.
        asked["max_completion_tokens" if "max_tokens" in self._left_out else "max_tokens"] = length
        if logprobs:
            asked |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        return {name: value for name, value in asked.items() if name not in self._left_out}

    def _leave_out(self, said: str, parameters: dict[str, Any]) -> bool:
        """Leave out the parameter that the server's message refuses, from now on. False if it names none that can be left out."""
        named = next((name for name in ("logprobs", "max_tokens", "temperature") if name in parameters and name in said), None)
        if named is None:
            return False
        with self._lock:
            if named not in self._left_out:
                log.warning("%s does not take the parameter %s, which is left out: %s", self.url, named, said)
            self._left_out |= {"logprobs", "top_logprobs"} if named == "logprobs" else {named}
        return True

    def _send(self, messages: Messages, parameters: dict[str, Any]) -> Reply | tuple[str, int, float | None]:
        """Send one request. Returns the reply; or an error message, the status or 0, and the seconds that the server asks to wait."""
        with self._lock:
            self._check_budget()
            self.cost.requests += 1
        try:
            create = self._client.chat.completions.with_raw_response.create
            raw = create(model=self.model, messages=messages, extra_headers=self._headers, **parameters)
            reply = read_reply(raw.http_response.json(), messages)
        except self._openai.APIStatusError as error:
            return self._without_secrets(one_line(error)), error.status_code, asked_wait(error.response.headers.get("retry-after"))
        except self._openai.APIConnectionError as error:
            return self._without_secrets(one_line(error.__cause__ or error)), 0, None
        except (self._openai.OpenAIError, BadReply, ValueError, RecursionError) as error:
            return f"its reply cannot be read ({self._without_secrets(one_line(error))})", 0, None
        with self._lock:
            self.cost.tokens += reply.tokens
        return replace(reply, words=self._without_secrets(reply.words))

    def _check_budget(self) -> None:
        for name, spent, limit in (
            ("max_requests", self.cost.requests, self.max_requests),
            ("max_tokens", self.cost.tokens, self.max_tokens),
        ):
            if limit is not None and spent >= limit:
                raise BudgetExhausted(f"{name}: the budget of {limit} is spent: raise it")

    def _raise_if_final(self, said: str, status: int) -> None:
        """Raise an error for a status that another try will not change."""
        if status in (401, 403):
            problem = "is not accepted" if read_key(self.key_variable) else "is not set"
            raise InputError(f"key_variable: {self.url} refuses access ({status}), the key in {self.key_variable} {problem}: {said}")
        if status == 404:
            raise InputError(f"model or url: {self.url} does not know the model {self.model!r}, or has no chat interface (404): {said}")
        if status in (400, 413, 422):
            raise QuestionRefused(said)
        if 300 <= status < 500 and status not in TRANSIENT:
            raise InputError(f"url: {self.url} refuses requests ({status}): {said}")

    def _without_secrets(self, text: str) -> str:
        """A text without the key, the login of the address and other tokens of the user, which a server may repeat."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return redact(text)


def public_url(url: str) -> str:
    """An address without login, query and fragment. Text that is no http or https address is an `InputError`.

    >>> public_url("http://me:secret@127.0.0.1:8000/v1/?key=secret")
    'http://127.0.0.1:8000/v1'
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme not in ("http", "https") or not host:
        raise InputError(f"url must be an address such as http://127.0.0.1:8000/v1, got {redact(url).partition('?')[0]!r}")
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{parts.path.rstrip('/')}"


def read_key(variable: str) -> str:
    """The key in an environment variable; empty if it is not set. A key that does not fit into an HTTP header is an `InputError`."""
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise InputError(f"key_variable: {variable} holds characters that no key has")
    return key


def open_client(url: str, key: str, timeout: float) -> tuple[Any, Any]:
    """The module `openai`, and a client that sends each request once."""
    try:
        import openai
    except ImportError as error:
        raise InputError("the judge openai needs the package openai: pip install 'metasae-lightning[judge]'") from error
    return openai, openai.OpenAI(api_key=key or "none", base_url=url, timeout=timeout, max_retries=0)


def asked_wait(header: str | None) -> float | None:
    """The seconds in a `Retry-After` header, which holds a number or a date; None if it holds neither.

    >>> asked_wait("2"), asked_wait("soon"), asked_wait("Thu, 01 Jan 1970 00:00:00 GMT"), asked_wait("nan")
    (2.0, None, 0.0, None)
    """
    try:
        seconds = float(header or "")
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(header or "").timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None

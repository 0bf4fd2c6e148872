"""Replies of servers with OpenAI's chat interface: their text, log-probabilities and number of tokens. Every value is checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, isnan
from typing import Any

from metasae_lightning.judging.judges.prompts import Messages

# A count of tokens that is not below this is taken for an error of the server.
MOST_TOKENS = 10**8


class BadReply(ValueError):
    """A reply without the fields that OpenAI's chat interface defines."""


@dataclass(frozen=True)
class Reply:
    """The text, size and log-probabilities of a reply."""

    words: str
    """The text; empty where the model refused to write one."""
    tokens: int
    """Tokens of prompt and text; where the server does not count them, an estimate of one for four characters."""
    alternatives: tuple[tuple[str, float], ...]
    """The first written token that is not blank, then the other candidates for its place, each with its log-probability; may be empty."""
    is_counted: bool
    """Whether the server counted the tokens, which says that it computed the reply and charges for it."""


def read_reply(body: Any, messages: Messages) -> Reply:
    """The text, size and log-probabilities in the JSON body of a reply to messages.

    A body without a message is an empty reply if the server counted its tokens, and a `BadReply` if not.
    """
    counted = counted_tokens(body)
    try:
        choice = body["choices"][0]
        words = choice["message"].get("content")
    except (LookupError, TypeError, AttributeError) as error:
        if counted is not None:
            return Reply("", counted, (), is_counted=True)
        raise BadReply("no message in it") from error
    words = words if isinstance(words, str) else ""
    estimated = ceil((sum(len(message["content"]) for message in messages) + len(words)) / 4)
    return Reply(words, estimated if counted is None else counted, _alternatives(choice), is_counted=counted is not None)


def counted_tokens(body: Any) -> int | None:
    """The server's count of the tokens of prompt and text; None if there is none, or an impossible one.

    >>> counted_tokens({"usage": {"total_tokens": 12}}), counted_tokens({"usage": {"total_tokens": -1}}), counted_tokens([])
    (12, None, None)
    """
    usage = body.get("usage") if isinstance(body, dict) else None
    tokens = usage.get("total_tokens") if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and 0 < tokens < MOST_TOKENS else None


def _alternatives(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    """The alternatives in a reply's choice (see `Reply`); empty if log-probabilities are missing or malformed."""
    try:
        entry = next(entry for entry in choice["logprobs"]["content"] if entry["token"].strip())
        pairs = {entry["token"]: entry["logprob"]} | {other["token"]: other["logprob"] for other in entry["top_logprobs"]}
    except (LookupError, TypeError, AttributeError, StopIteration):
        return ()
    if not all(
        isinstance(token, str) and type(value) in (int, float) and value <= 1e-3 and not isnan(value) for token, value in pairs.items()
    ):
        return ()
    return tuple((token, float(value)) for token, value in pairs.items())


def choice_probabilities(choices: Sequence[str], alternatives: Sequence[tuple[str, float]]) -> tuple[float, ...]:
    """Probability of each choice, from the tokens with which it can begin; empty if the written token begins none of them.

    >>> pairs = [("Yes", -0.5), (" no", -1.5), ("Maybe", -3.0)]
    >>> [round(p, 4) for p in choice_probabilities(("no", "yes"), pairs)], choice_probabilities(("A", "B"), pairs)
    ([0.2689, 0.7311], ())
    """
    if not alternatives or choice_of_token(choices, alternatives[0][0]) is None:
        return ()
    sums = [0.0] * len(choices)
    for token, value in alternatives:
        if (index := choice_of_token(choices, token)) is not None:
            sums[index] += exp(value)
    total = sum(sums)
    return tuple(value / total for value in sums) if total > 0 else ()


def choice_of_token(choices: Sequence[str], token: str) -> int | None:
    """Index of the only choice that begins with a token; None if no choice or several do.

    Spaces are ignored. Case is ignored too, except for choices of a single letter.

    >>> choice_of_token(("no", "yes"), " Ye"), choice_of_token(("no", "not"), "no")
    (1, None)
    >>> choice_of_token(("A", "B"), "a"), choice_of_token(("A", "B"), " B")
    (None, 1)
    """
    text = token.strip()
    found = [
        index
        for index, choice in enumerate(choices)
        if text and (choice == text or (len(choice) > 1 and choice.lower().startswith(text.lower())))
    ]
    return found[0] if len(found) == 1 else None

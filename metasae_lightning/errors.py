"""`InputError`, the exception for mistakes of the user. The command line prints it as one line.

The command line also prints as one line: errors of its parser, of Lightning's configuration and of the system, and the end of another rank.
Any other exception is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user gave something that cannot be used. The message names the argument, what it must be, and what it was."""


def did_you_mean(name: str, known: Iterable[str], n: int = 3) -> str:
    """A suffix for an error message with the known names most similar to `name`; empty where no name is similar.

    >>> did_you_mean("batch_sise", ["batch_size", "tokens"])
    ' (did you mean batch_size?)'
    >>> did_you_mean("zzz", ["batch_size"])
    ''
    """
    similar = difflib.get_close_matches(name, list(known), n=n)
    return f" (did you mean {' or '.join(similar)}?)" if similar else ""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, cut to 300 characters; its type's name if the message is empty.

    >>> one_line(ValueError("two\\nlines")), one_line(KeyError())
    ('two lines', 'KeyError')
    """
    return " ".join(str(error).split())[:300] or type(error).__name__

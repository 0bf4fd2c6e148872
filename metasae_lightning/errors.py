"""The one exception a user can cause; the command line prints it as a line, everything else is a bug and keeps its traceback."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave cannot be used; the message names the argument, the demand and what came."""


def did_you_mean(name: str, known: Iterable[str], n: int = 3) -> str:
    """A suffix naming the nearest known names, or nothing where none is near.

    >>> did_you_mean("batch_sise", ["batch_size", "tokens"])
    ' (did you mean batch_size?)'
    >>> did_you_mean("zzz", ["batch_size"])
    ''
    """
    near = difflib.get_close_matches(name, list(known), n=n)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def one_line(error: BaseException) -> str:
    """An exception's message on one line, cut to 300 characters; its type's name if the message is empty.

    >>> one_line(ValueError("two\\nlines")), one_line(KeyError())
    ('two lines', 'KeyError')
    """
    return " ".join(str(error).split())[:300] or type(error).__name__

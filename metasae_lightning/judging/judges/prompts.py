"""Prompts for language models as judges: one file for each task, into which a question's texts are written as quoted data."""

import hashlib
import json
import re
import unicodedata
from functools import cache
from pathlib import Path

from metasae_lightning.judging.judges.questions import Question, ShownText, Task

Messages = list[dict[str, str]]
PROMPT_FOLDER = Path(__file__).parent / "prompts"
# The line between the system message and the user message in a prompt file.
SEPARATOR = "\n---\n"
# Characters that are written as escapes: control, format, surrogate, private and unassigned ones, and separators of lines.
ESCAPED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@cache
def template(task: Task) -> tuple[str, str]:
    """The system message and the user message in a task's prompt file, with their fields in braces."""
    system, user = (PROMPT_FOLDER / f"{task}.txt").read_text(encoding="utf-8").split(SEPARATOR)
    return system.strip(), user.strip()


@cache
def version(task: Task) -> str:
    """A hash of the content of a task's prompt file."""
    return hashlib.blake2b((PROMPT_FOLDER / f"{task}.txt").read_bytes(), digest_size=8).hexdigest()


def messages(question: Question) -> Messages:
    """The system message and the user message that ask a question."""
    values = {
        "explanation": quote(question.explanation),
        "texts": "\n".join(f"{label}. {shown(question.task, text)}" for label, text in zip(labels(question), question.texts, strict=True)),
        "choices": " or ".join(question.choices),
        "numbers": str(question.numbers),
    }
    # All fields are filled in at once, so that braces inside a text are never taken for a field.
    system, user = (re.sub(r"\{(\w+)\}", lambda match: values[match[1]], part) for part in template(question.task))
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def labels(question: Question) -> tuple[str, ...]:
    """The label of each text in a prompt: its choice if the question is which text, or else its number."""
    if question.task in ("replacement_2afc", "intruder") and len(question.choices) == len(question.texts):
        return question.choices
    return tuple(str(number + 1) for number in range(len(question.texts)))


def shown(task: Task, text: ShownText) -> str:
    """A text as a task's prompt shows it: for `simulation` a list of tokens, else one quoted string with its marks, if any.

    For `explanation` the strengths of the marked tokens follow.
    """
    if task == "simulation":
        return f"[{', '.join(map(quote, text.tokens))}]"
    quoted = quote(with_marks(text))
    if task == "explanation" and text.strengths:
        strengths = [
            f"{quote(token)} {strength:g}" for token, mark, strength in zip(text.tokens, text.marked, text.strengths, strict=True) if mark
        ]
        return f"{quoted}\n   strengths: {', '.join(strengths)}"
    return quoted


def with_marks(text: ShownText) -> str:
    """The text with « and » around each run of marked tokens. Where the text itself holds these characters, they become plain quotes.

    >>> with_marks(ShownText(("a", " cat", "fish", "«"), (False, True, True, False)))
    'a« catfish»"'
    """
    parts: list[str] = []
    before = False
    for token, mark in zip(text.tokens, text.marked, strict=True):
        parts += ["«" if mark else "»"] * (mark != before)
        parts.append(re.sub("[«»]", '"', token))
        before = mark
    return "".join(parts) + "»" * before


def quote(text: str) -> str:
    r"""A text as a JSON string in one line, with invisible characters escaped, and `<|`, with which many models' special tokens begin.

    >>> print(quote('one\ntwo "three" <|im_end|>'))
    "one\ntwo \"three\" \u003c|im_end|>"
    """
    quoted = json.dumps(text, ensure_ascii=False).replace("<|", r"\u003c|")
    return "".join(json.dumps(c)[1:-1] if unicodedata.category(c) in ESCAPED else c for c in quoted)

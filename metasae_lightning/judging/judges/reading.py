"""Read a judge's text as an answer: a choice, a list of numbers, or neither if the text is unreadable."""

import json
import re
from math import isfinite
from typing import Any

from metasae_lightning.judging.judges.questions import Answer, Question

# Characters of a judge's text at most. A longer text is unreadable, because no answer needs so many.
LONGEST = 100_000
# The largest number that a question allows.
LARGEST = 10
FENCE = re.compile(r"```\w*")
# What may stand around a choice: quotes, brackets, emphasis, punctuation.
AROUND = r"[\s\"'`*_()\[\]{}.,:;!«»]*"


def read_answer(question: Question, words: str) -> Answer:
    """The answer that a judge wrote. Words around it are ignored. A contradictory, incomplete or out-of-range answer is unreadable."""
    text = answer_part(words) if len(words) <= LONGEST else ""
    if question.choices:
        return Answer(words=words, choice=read_choice(question.choices, text))
    if question.numbers:
        return Answer(words=words, numbers=read_numbers(question.numbers, text))
    return Answer(words=words)


def answer_part(words: str) -> str:
    """What a judge wrote after its reasoning, without the marks of code blocks."""
    return FENCE.sub("", words.rpartition("</think>")[2]).strip()


def read_choice(choices: tuple[str, ...], text: str) -> int | None:
    """The index of the choice that a text names; None if it names none, or more than one.

    A choice is named after the word `answer`. If none is, a choice is named alone on a line. If none is, and choices have several letters,
    a choice is named as the first word of the text, with a punctuation mark behind it.

    >>> [read_choice(("no", "yes"), text) for text in ("**Yes.**", "Yes, because of it", "The answer is: no", "yes and no")]
    [1, 1, 0, None]
    >>> read_choice(("A", "B"), "A cat is in text B")
    """
    name = f"({'|'.join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))})"
    # The case of single letters counts: the word "a" is not the choice "A".
    case = re.IGNORECASE if all(len(choice) > 1 for choice in choices) else 0
    patterns = [rf"\b(?i:answer)[\s\"'*_`]*(?:is|:|=)?[\s\"'*_`:(\[]*{name}\b", rf"^{AROUND}{name}{AROUND}$"]
    if case:
        patterns.append(rf"\A{AROUND}{name}[.,:;!]")
    indices = {choice.lower() if case else choice: index for index, choice in enumerate(choices)}
    lines = "\n".join(line.strip()[:1000] for line in text.splitlines())
    for pattern in patterns:
        found = {indices[named.lower() if case else named] for named in re.findall(pattern, lines, case | re.MULTILINE)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def read_numbers(count: int, text: str) -> tuple[float, ...]:
    """The JSON array of `count` numbers from 0 to 10 in a text; empty if there is none, or if there are several different ones.

    >>> read_numbers(3, "Here you are: [0, 2.5, 10]"), read_numbers(3, "[1, 2]"), read_numbers(1, "[11]"), read_numbers(1, "[true]")
    ((0.0, 2.5, 10.0), (), (), ())
    """
    found = {numbers for array in re.findall(r"\[[^\[\]]*\]", text) if (numbers := as_numbers(array)) and len(numbers) == count}
    return found.pop() if len(found) == 1 else ()


def as_numbers(array: str) -> tuple[float, ...]:
    """The numbers of a JSON array; empty if anything else is in it, or a number that is not in 0 to 10."""
    try:
        values: list[Any] = json.loads(array)
    except (ValueError, RecursionError):
        return ()
    is_right = all(type(value) in (int, float) and isfinite(value) and 0 <= value <= LARGEST for value in values)
    return tuple(map(float, values)) if is_right else ()


def read_explanation(words: str) -> str:
    """The explanation in a judge's text: the first line that does not end in a colon, without a label and quotes.

    >>> read_explanation("Sure, here it is:\\n\\n**Explanation:** names of cats\\nI hope this helps.")
    'names of cats'
    """
    lines = [line.strip(" \t*`") for line in answer_part(words).splitlines()]
    lines = [re.sub(r"^(explanation|answer)\W*:[\s*`]*", "", line, flags=re.IGNORECASE) for line in lines]
    # Quotes around the whole line are taken away; a quoted word at its end keeps them.
    lines = [re.sub(r"^([\"'])([^\"]*)\1$", r"\2", line) for line in lines]
    return next((line for line in lines if line and not line.endswith(":")), "")


def answer_length(question: Question) -> int:
    """The tokens that an answer needs at most."""
    if question.choices:
        return 16
    return 32 + 6 * question.numbers if question.numbers else 100

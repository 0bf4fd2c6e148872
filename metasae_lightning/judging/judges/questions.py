"""Questions for a judge, and its answers."""

from dataclasses import dataclass
from typing import Literal

Task = Literal["explanation", "detection", "fuzzing", "replacement_2afc", "strength", "simulation", "intruder"]


@dataclass(frozen=True)
class ShownText:
    """A text in a question, token by token."""

    tokens: tuple[str, ...]
    """Texts of the tokens."""
    marked: tuple[bool, ...]
    """Whether each token is marked for the judge."""
    strengths: tuple[float, ...] = ()
    """Activation of each token from 0 to 10, where 10 is the largest in the text, for questions that show it; else empty."""

    @property
    def text(self) -> str:
        """The text without marks."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Question:
    """One question for a judge."""

    task: Task
    """The kind of question; each has its own prompt."""
    texts: tuple[ShownText, ...]
    """The texts that the question is about."""
    explanation: str = ""
    """The explanation of the latent; empty for tasks that need none."""
    choices: tuple[str, ...] = ()
    """The possible answers, such as `("no", "yes")`; empty for a task that asks for words or numbers."""
    numbers: int = 0
    """How many numbers are asked for, each from 0 to 10; 0 for other tasks."""


@dataclass(frozen=True)
class Answer:
    """A judge's answer. An unreadable answer has no choice, probabilities or numbers."""

    words: str = ""
    """The text that the judge wrote, unchanged; empty for a judge that writes none."""
    choice: int | None = None
    """Index of the chosen answer."""
    probabilities: tuple[float, ...] = ()
    """Probability of each choice, if the judge gives them. They sum to 1."""
    numbers: tuple[float, ...] = ()
    """The numbers that were asked for."""
    is_missing: bool = False
    """Whether the judge gave no answer, because it refused the question or could not read all of it."""

    @property
    def is_readable(self) -> bool:
        """Whether the answer has a choice or numbers."""
        return self.choice is not None or bool(self.numbers)


@dataclass
class Cost:
    """Requests, tokens and time that answers have taken."""

    requests: int = 0
    """Requests sent to a server, repeated ones included; or batches of a local model."""
    tokens: int = 0
    """Tokens of prompts and answers."""
    seconds: float = 0.0
    """Time spent waiting for answers."""
    reused: int = 0
    """Answers taken from the ledger."""

    def add(self, other: "Cost") -> None:
        """Add another cost."""
        self.requests += other.requests
        self.tokens += other.tokens
        self.seconds += other.seconds
        self.reused += other.reused

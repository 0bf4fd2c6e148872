"""The base class of judges."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from typing import Any

from metasae_lightning.judging.judges.questions import Answer, Cost, Question, Task


class Judge(ABC):
    """A judge, which answers questions about texts."""

    tasks: Set[Task]
    """The tasks whose questions it answers."""

    def __init__(self) -> None:
        self.cost = Cost()

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The model and the settings that its answers depend on, as JSON values. It never holds a key or password."""

    @abstractmethod
    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """The answer to each question, in order. Their requests, tokens and time are added to `cost`."""

    def stream_answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Indices of questions with their answers, in any order, each as soon as the judge has it.

        The answer to a question that a server refuses, or that is too long for the model, is missing.
        """
        yield from enumerate(self.answers(questions))

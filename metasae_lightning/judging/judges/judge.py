"""The base class of judges."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Set
from typing import Any

from metasae_lightning.judging.judges.questions import Answer, Cost, Question, Task


class Judge(ABC):
    """Answers questions about texts."""

    tasks: Set[Task]
    """The tasks whose questions it answers."""

    def __init__(self) -> None:
        self.cost = Cost()

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What its answers depend on beside the question: model, settings, prompts. It never holds a key or password."""

    @abstractmethod
    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question, in order. What they cost is added to `cost`."""

    def stream_answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Indices of questions with their answers, in any order. A judge whose answers come one after another gives each when it came.

        The answer of a request that failed is empty.
        """
        yield from enumerate(self.answers(questions))

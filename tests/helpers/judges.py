"""Judges for tests: one that is right by construction, and one that answers at random."""

import zlib
from collections.abc import Sequence
from typing import Any, final, get_args

import numpy as np

from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.questions import Answer, Question, ShownText, Task
from metasae_lightning.judging.texts.concepts import word_explanation, words_of_tokens
from metasae_lightning.judging.texts.planted import PlantedTruth


@final
class OracleJudge(Judge):
    """Answers from the explanation and the shown texts alone: it finds the tokens on which the explanation's concept holds.

    `hypotheses` are explanations that it may choose from where a question has none. Without any it knows single words only.
    """

    tasks = frozenset(get_args(Task))

    def __init__(self, hypotheses: Sequence[str] = ()) -> None:
        super().__init__()
        self.hypotheses = tuple(hypotheses)

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "oracle", "hypotheses": list(self.hypotheses)}

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        self.cost.requests += len(questions)
        return [self.answer(question) for question in questions]

    def answer(self, question: Question) -> Answer:
        """The right answer to a question if its explanation is right."""
        texts = question.texts
        if question.task == "explanation":
            return Answer(words=self.explanation(texts))
        if question.task == "intruder":
            return certain(self.intruder(texts), question)
        masks = [PlantedTruth.concept_mask(question.explanation, text.tokens) for text in texts]
        if question.task == "detection":
            return certain(int(masks[0].any()), question)
        if question.task == "fuzzing":
            marked = np.array(texts[0].marked)
            return certain(int(marked.any() and masks[0][marked].all()), question)
        if question.task == "replacement_2afc":
            return certain(int(np.argmax([mask.sum() for mask in masks])), question)
        if question.task == "strength":
            return Answer(numbers=tuple(10.0 * mask.any() for mask in masks))
        return Answer(numbers=tuple((10.0 * masks[0]).tolist()))

    def explanation(self, texts: Sequence[ShownText]) -> str:
        """The hypothesis that holds on the marked tokens and on few others."""

        def f1(hypothesis: str) -> float:
            masks = [PlantedTruth.concept_mask(hypothesis, text.tokens) for text in texts]
            marked = [np.array(text.marked) for text in texts]
            both = sum(int((mask & mark).sum()) for mask, mark in zip(masks, marked, strict=True))
            return 2 * both / max(1, sum(int(mask.sum() + mark.sum()) for mask, mark in zip(masks, marked, strict=True)))

        return max(self._hypotheses(texts), key=f1, default="")

    def intruder(self, texts: Sequence[ShownText]) -> int:
        """The text whose marked tokens lack a concept that those of all the others have."""

        def holds(hypothesis: str, text: ShownText) -> bool:
            marked = np.array(text.marked)
            return bool(PlantedTruth.concept_mask(hypothesis, text.tokens)[marked].any())

        table = np.array([[holds(hypothesis, text) for text in texts] for hypothesis in self._hypotheses(texts)], dtype=int)
        if not len(table):
            return 0
        # How many others have the concept, and 1 less if this text has it.
        return int(np.argmax((table.sum(1, keepdims=True) - 2 * table).max(0)))

    def _hypotheses(self, texts: Sequence[ShownText]) -> Sequence[str]:
        if self.hypotheses:
            return self.hypotheses
        words = [
            word
            for text in texts
            for word, first, last in words_of_tokens(text.tokens)
            if not any(text.marked) or any(text.marked[first : last + 1])
        ]
        return [word_explanation(word) for word in dict.fromkeys(words)]


@final
class RandomJudge(Judge):
    """Answers at random. The same question gets the same answer from the same seed."""

    tasks = frozenset(get_args(Task))

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "random", "seed": self.seed}

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        self.cost.requests += len(questions)
        return [self.answer(question) for question in questions]

    def answer(self, question: Question) -> Answer:
        """A random answer of the form that the question asks for."""
        generator = np.random.default_rng([self.seed, zlib.crc32(repr(question).encode())])
        if question.numbers:
            return Answer(numbers=tuple(generator.uniform(0, 10, question.numbers).tolist()))
        if not question.choices:
            words = [word for text in question.texts for word, _, _ in words_of_tokens(text.tokens)] or ["nothing"]
            return Answer(words=word_explanation(str(generator.choice(words))))
        probabilities = generator.dirichlet(np.ones(len(question.choices)))
        choice = int(probabilities.argmax())
        return Answer(question.choices[choice], choice, tuple(probabilities.tolist()))


def certain(choice: int, question: Question) -> Answer:
    """An answer with probability 1 for a choice."""
    probabilities = tuple(float(index == choice) for index in range(len(question.choices)))
    return Answer(question.choices[choice], choice, probabilities)

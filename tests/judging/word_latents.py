"""Latents that fire on one word each, in made-up contexts, and a judge that is right by construction."""

from collections.abc import Sequence

import numpy as np

from metasae_lightning.judging.judges.questions import Answer, Question, ShownText
from metasae_lightning.judging.texts.contexts import Context, LatentContexts

FILLER = tuple(f" f{index}" for index in range(40))


def word(latent: int) -> str:
    """The word that a latent fires on, which is also its explanation."""
    return f" w{latent}"


def word_latents(count: int, *, firing: int = 10, silent: int = 10) -> dict[int, LatentContexts]:
    """Latents whose nearest latent is the next one. A latent's activation on its word is the number of times that the context has it."""
    rng, document = np.random.default_rng(0), iter(range(10**6))

    def context(latent: int, holds: int, times: int) -> Context:
        tokens = [FILLER[index] for index in rng.integers(len(FILLER), size=12).tolist()]
        for place in rng.permutation(12)[:times].tolist():
            tokens[place] = word(holds)
        activations = [[float(times) if token == word(of) else 0.0 for token in tokens] for of in (latent, holds)]
        return Context(next(document), tuple(tokens), tuple(activations[0]), tuple(activations[1]) if times and holds != latent else ())

    def contexts(latent: int) -> LatentContexts:
        nearest = (latent + 1) % count
        holding = [[context(latent, latent, times) for times in np.linspace(4, 1, firing).round().astype(int).tolist()] for _ in range(2)]
        none, near = ([context(latent, nearest, times) for _ in range(silent)] for times in (0, 2))
        return LatentContexts(latent, 0.01, explaining=holding[0], firing=holding[1], silent=none, near=near, nearest=nearest)

    return {latent: contexts(latent) for latent in range(count)}


def right_answers(questions: Sequence[Question]) -> list[Answer]:
    """The answers of a judge that knows where the explanation's word is. Where it cannot tell, it takes the first choice."""
    return [right_answer(question) for question in questions]


def right_answer(question: Question) -> Answer:
    texts, explained = question.texts, question.explanation
    times = [text.tokens.count(explained) for text in texts]
    if question.task == "detection":
        return certain(int(times[0] > 0), question)
    if question.task == "fuzzing":
        return certain(int(words(texts[0]) == {explained}), question)
    if question.task == "replacement_2afc":
        return certain(times.index(max(times)), question)
    if question.task == "intruder":
        akin = [sum(bool(words(text) & words(other)) for other in texts if other is not text) for text in texts]
        return certain(akin.index(min(akin)), question)
    if question.task == "strength":
        return Answer(numbers=tuple(map(float, times)))
    return Answer(numbers=tuple(float(times[0]) if token == explained else 0.0 for token in texts[0].tokens))


def words(text: ShownText) -> set[str]:
    """The marked words of latents; fillers are none."""
    return {token for token, is_marked in zip(text.tokens, text.marked, strict=True) if is_marked and token not in FILLER}


def certain(choice: int, question: Question) -> Answer:
    """An answer with probability 1 for a choice."""
    probabilities = tuple(float(index == choice) for index in range(len(question.choices)))
    return Answer(question.choices[choice], choice, probabilities)


def random_answer(question: Question, rng: np.random.Generator, truth: int | tuple[float, ...], bias: float = 0.0) -> Answer:
    """A random answer, which is the right one with probability `bias` more than by chance."""
    if isinstance(truth, tuple):
        noise = rng.uniform(0, 10, question.numbers)
        return Answer(numbers=tuple(truth if rng.random() < bias else noise.tolist()))
    choice = truth if rng.random() < bias else int(rng.integers(len(question.choices)))
    return Answer(choice=choice)

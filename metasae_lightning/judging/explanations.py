"""Explanations of latents: written by a judge, made of words of their contexts, or read from the user's file."""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from metasae_lightning.errors import InputError
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.questions import Question, ShownText
from metasae_lightning.judging.judges.reading import read_explanation
from metasae_lightning.judging.scoring.marks import firing_mask
from metasae_lightning.judging.texts.contexts import Context, LatentContexts
from metasae_lightning.judging.texts.flat_text import FlatText
from metasae_lightning.judging.texts.text_words import Words

# Firing tokens and other words in an explanation by keywords, at most.
KEY_TOKENS, KEY_WORDS = 4, 6
# Characters of an explanation at most, the judge's or the user's.
MAX_LENGTH = 400


@dataclass(frozen=True)
class Explainer:
    """Explains latents from their contexts in one text."""

    kind: str
    """`keywords`, `judge`, or `none` for no explanations."""
    judge: Judge
    """The judge that writes the explanations of the kind `judge`."""
    text: FlatText
    """The text, for the rarity of its words."""

    def __post_init__(self) -> None:
        if self.kind == "judge" and "explanation" not in self.judge.tasks:
            raise InputError("explanations: this judge writes none: take keywords, none or a file, or another judge")

    def explanations(self, contexts: Mapping[int, LatentContexts]) -> dict[int, str]:
        """The explanation of each latent, empty where the judge wrote nothing; no entries for the kind `none`."""
        if self.kind == "none":
            return {}
        return explained_by_judge(self.judge, contexts) if self.kind == "judge" else explained_by_keywords(contexts, self.rarity)

    @cached_property
    def rarity(self) -> dict[str, float]:
        """The rarity of each word of the text, as `word_rarity` defines it."""
        return word_rarity(self.text)


def explained_by_judge(judge: Judge, contexts: Mapping[int, LatentContexts]) -> dict[int, str]:
    """The judge's explanation of each latent, from its contexts for the explanation; empty where the judge wrote nothing."""
    questions = [Question("explanation", tuple(map(with_strengths, found.explaining))) for found in contexts.values()]
    answers = judge.answers(questions)
    return {latent: one_line(read_explanation(answer.words)) for latent, answer in zip(contexts, answers, strict=True)}


def with_strengths(context: Context) -> ShownText:
    """A context with its firing tokens marked, and strengths from 0 to 10, where 10 is the largest activation in the context."""
    peak = context.peak or 1.0
    strengths = tuple(round(10 * max(value, 0.0) / peak) for value in context.activations)
    return ShownText(context.tokens, firing_mask(context.activations), tuple(map(float, strengths)))


def explained_by_keywords(contexts: Mapping[int, LatentContexts], rarity: Mapping[str, float]) -> dict[int, str]:
    """For each latent, its most frequent firing tokens, and other words that are frequent in its contexts and rare in the text.

    The weight of a word is the number of the latent's contexts that hold it, times its `rarity`. A word needs two contexts.
    """
    return {latent: keywords(found, rarity) for latent, found in contexts.items()}


def keywords(found: LatentContexts, rarity: Mapping[str, float]) -> str:
    """The explanation of one latent by keywords, from its contexts for the explanation."""
    fired = Counter(token.strip() or repr(token) for context in found.explaining for token in firing_tokens(context))
    tokens = sorted(fired, key=lambda token: (-fired[token], token))[:KEY_TOKENS]
    counts = Counter(word for context in found.explaining for word in words_in(context))
    shown = {token.lower() for token in tokens}
    weights = {word: count * rarity.get(word, 0.0) for word, count in counts.items() if count > 1 and word not in shown}
    beside = sorted(weights, key=lambda word: (-weights[word], word))[:KEY_WORDS]
    return ", ".join(tokens) + (f"; near {', '.join(beside)}" if beside else "")


def word_rarity(text: FlatText) -> dict[str, float]:
    """The rarity of each word of a text: minus the logarithm of the share of documents that hold it."""
    words = Words.of(text)
    documents = len(text.hashes)
    return {name: math.log(documents / count) for name, count in zip(words.names, words.n_documents().tolist(), strict=True) if count}


def firing_tokens(context: Context) -> set[str]:
    """The texts of the tokens that count as firing (see `firing_mask`)."""
    return {token for token, fires in zip(context.tokens, firing_mask(context.activations), strict=True) if fires}


def words_in(context: Context) -> set[str]:
    """The words of a context in lower case, of three letters or more, each a run of the letters A to Z.

    >>> sorted(words_in(Context(0, ("The", " cats", " of", " x1"), (0.0,) * 4)))
    ['cats', 'the']
    """
    return {word.lower() for word in re.findall(r"[A-Za-z]{3,}", context.text)}


def read_explanations(path: Path) -> dict[str, dict[int, str]]:
    """A user's explanations by arm and latent; the arm is `""` where the file names none.

    A CSV file has the columns `latent`, `explanation` and, for several arms, `arm`. A JSON file maps latents to explanations, or arms to
    such maps. Anything else is an `InputError`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        rows = rows_of_json(json.loads(text)) if path.suffix.lower() == ".json" else rows_of_csv(text)
        explanations: dict[str, dict[int, str]] = {}
        for arm, latent, explanation in rows:
            number = int(latent)
            if number < 0 or number in explanations.setdefault(arm, {}):
                raise InputError(f"{path}: latent {latent} is {'negative' if number < 0 else 'explained twice'}")
            explanations[arm][number] = one_line(explanation)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"explanations: {path} cannot be read as explanations of latents: {' '.join(str(error).split())}") from error
    if not any(explanations.values()):
        raise InputError(f"explanations: {path} explains no latent")
    return explanations


def rows_of_csv(text: str) -> list[tuple[str, str, str]]:
    """Arm, latent and explanation of each row of a CSV file."""
    rows = list(csv.DictReader(text.splitlines(keepends=True)))
    return [((row.get("arm") or "").strip(), row["latent"], row["explanation"]) for row in rows]


def rows_of_json(content: Any) -> list[tuple[str, str, str]]:
    """Arm, latent and explanation of each entry of a JSON file."""
    by_arm = content if all(isinstance(value, dict) for value in content.values()) else {"": content}
    return [(arm, latent, str(explanation)) for arm, of_arm in by_arm.items() for latent, explanation in of_arm.items()]


def one_line(text: str) -> str:
    """A text in one line of at most `MAX_LENGTH` characters, without control characters.

    >>> one_line(" fires on\\n cats\\x1b[31m ")
    'fires on cats [31m'
    """
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", " ", text).split())[:MAX_LENGTH].rstrip()


def check_latents(explanations: Mapping[int, str], d_sae: int, live: Sequence[bool]) -> None:
    """Raise an `InputError` if the SAE lacks one of the explained latents, or if none of them fires on the text."""
    for latent in explanations:
        if latent >= d_sae:
            raise InputError(f"explanations: there is no latent {latent}: the SAE has {d_sae}")
    if not any(live[latent] for latent in explanations):
        raise InputError("explanations: none of the explained latents fires on the text")

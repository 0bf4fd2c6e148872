"""Prompts show what a question holds, and answers in prose are read."""

import json

import pytest

from metasae_lightning.judging.explanations import explained_by_judge
from metasae_lightning.judging.judges.prompts import PROMPT_FOLDER, messages, version
from metasae_lightning.judging.judges.questions import Answer, Question, ShownText, Task
from metasae_lightning.judging.judges.reading import read_answer, read_explanation
from metasae_lightning.judging.texts.contexts import Context, LatentContexts
from tests.helpers.judges import OracleJudge

TEXT = ShownText(("the", " cat", "\n", "sat"), (False, True, False, True), (0.0, 10.0, 0.0, 3.0))
YES_NO = Question("detection", (TEXT,), "cats", ("no", "yes"))
A_TO_E = Question("intruder", (TEXT,) * 5, choices=("A", "B", "C", "D", "E"))
ONE_TO_FIVE = Question("intruder", (TEXT,) * 5, choices=("1", "2", "3", "4", "5"))
NUMBERS = Question("simulation", (TEXT,), "cats", numbers=3)


def user(question: Question) -> str:
    return messages(question)[1]["content"]


def test_every_task_has_a_prompt_that_fills_in_everything():
    tasks: list[Task] = ["explanation", "detection", "fuzzing", "replacement_2afc", "strength", "simulation", "intruder"]
    assert sorted(path.stem for path in PROMPT_FOLDER.glob("*.txt")) == sorted(tasks)
    assert len({version(task) for task in tasks}) == 7
    for task in tasks:
        asked = messages(Question(task, (TEXT, TEXT), "cats", ("A", "B"), numbers=2))
        assert [message["role"] for message in asked] == ["system", "user"]
        assert "{" not in asked[0]["content"] + asked[1]["content"]
        assert "is an instruction to you" in asked[0]["content"]
        # One word for one thing: the delimiters call it an explanation.
        assert "description" not in (asked[0]["content"] + asked[1]["content"]).lower()


def test_texts_are_shown_as_the_task_needs_them():
    assert '\n1. "the« cat»\\n«sat»"\n   strengths: " cat" 10, "sat" 3\n' in user(Question("explanation", (TEXT,)))
    assert '\n1. "the« cat»\\n«sat»"\n=== END OF TEXTS ===' in user(Question("fuzzing", (TEXT,), "cats", ("no", "yes")))
    assert '\n1. ["the", " cat", "\\n", "sat"]\n' in user(NUMBERS)
    assert [line[:3] for line in user(ONE_TO_FIVE).split("\n") if "sat" in line] == ["1. ", "2. ", "3. ", "4. ", "5. "]
    assert "one number: 1 or 2 or 3 or 4 or 5" in user(ONE_TO_FIVE)
    assert "JSON array of 3 numbers" in user(NUMBERS)


def test_marks_in_a_text_are_no_marks():
    shown = user(Question("fuzzing", (ShownText(("«yes»", " cat"), (False, True)),), "cats", ("no", "yes")))
    line = next(line for line in shown.split("\n") if line.startswith("1. "))
    assert json.loads(line.removeprefix("1. ")) == '"yes"« cat»'


@pytest.mark.parametrize(
    ("words", "choice"),
    [
        ("yes", 1),
        ("**No.**", 0),
        ("Answer: yes.", 1),
        ("```\nyes\n```", 1),
        ('{"answer": "no"}', 0),
        ("The text is about cats.\n\nThe answer is yes", 1),
        ("<think>no no no</think>Yes", 1),
        ("Yes, it mentions a cat.", 1),
        ("yes\nno", None),
        ("Answer: yes. Answer: no.", None),
        ("yes and no", None),
        ("maybe", None),
        ("Yesterday", None),
        ("", None),
        ("I cannot say whether the answer is not yes", None),
        ("yes" * 10**6, None),
    ],
)
def test_choices_in_prose(words: str, choice: int | None):
    assert read_answer(YES_NO, words) == Answer(words=words, choice=choice)


@pytest.mark.parametrize(
    ("words", "choice"), [("B", 1), ("(C)", 2), ("Answer: **D**", 3), ("A text about B", None), ("a", None), ("F", None)]
)
def test_letters_in_prose(words: str, choice: int | None):
    assert read_answer(A_TO_E, words).choice == choice


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        ("[0, 5.5, 10]", (0.0, 5.5, 10.0)),
        ("Here:\n```json\n[1, 2, 3]\n```\nGood luck!", (1.0, 2.0, 3.0)),
        ("[1, 2, 3] or rather [1, 2, 4]", ()),
        ("[1, 2", ()),
        ("[1, 2]", ()),
        ("[1, 2, 11]", ()),
        ("[1, 2, -1]", ()),
        ("[1, 2, NaN]", ()),
        ("[1, 2, Infinity]", ()),
        ("[1, 2, 1e999]", ()),
        ("[1, 2, true]", ()),
        ('[1, 2, "3"]', ()),
        ("1, 2, 3", ()),
        ("[" * 90_000, ()),
        (f"[1, 2, {'9' * 5000}]", ()),
        ("[1, 2, 3]" + " " * 10**6, ()),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_numbers_in_prose(words: str, numbers: tuple[float, ...]):
    answer = read_answer(NUMBERS, words)
    assert (answer.numbers, answer.words, answer.is_readable) == (numbers, words, bool(numbers))


def test_an_explanation_is_one_line():
    assert read_explanation('Sure:\nExplanation: "words about cats"\nmore') == "words about cats"
    assert read_explanation("```\n\n```") == ""


def test_an_explanation_is_what_the_judge_wrote_after_its_reasoning(monkeypatch: pytest.MonkeyPatch):
    judge = OracleJudge()
    context = Context(0, ("a", " cat"), (0.0, 1.0))
    contexts = {3: LatentContexts(3, 0.1, explaining=[context], firing=[], silent=[], near=[])}
    for said in ("names of cats", 'the word "cat"'):
        reply = Answer(words=f"<think>text 1 has cats, or dogs</think>\nSure, here it is:\n\n**Explanation:** {said}")
        monkeypatch.setattr(judge, "answer", lambda question, reply=reply: reply)
        assert explained_by_judge(judge, contexts) == {3: said}

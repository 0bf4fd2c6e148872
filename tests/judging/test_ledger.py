"""The ledger keeps every answer: after a kill, between processes, and apart for each judge, prompt and question."""

import os
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metasae_lightning.errors import InputError
from metasae_lightning.judging.judges import prompts
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.ledger import JudgeWithLedger, Ledger, key_of
from metasae_lightning.judging.judges.openai_judge import OpenAIJudge
from metasae_lightning.judging.judges.questions import Answer, Question, ShownText
from tests.helpers.chat_api import MODEL, ChatAPI

ROOT = Path(__file__).parents[2]


def question(text: str) -> Question:
    return Question("detection", (ShownText((text,), (False,)),), "cats", ("no", "yes"))


class Counted(Judge):
    """Answers each question by its length, one at a time, and fails after `most` answers."""

    tasks = frozenset({"detection"})

    def __init__(self, name: str = "counted", most: float = float("inf")) -> None:
        super().__init__()
        self.name, self.most, self.asked = name, most, list[str]()

    @property
    def identity(self) -> dict[str, Any]:
        return {"model": self.name}

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        return [answer for _, answer in self.stream_answers(questions)]

    def stream_answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        for index, asked in enumerate(questions):
            if len(self.asked) >= self.most:
                raise InputError("no more")
            self.asked.append(asked.texts[0].text)
            yield index, Answer(words=self.name, choice=len(asked.texts[0].text) % 2)


def test_each_question_is_asked_once_and_answers_are_in_order(tmp_path: Path):
    texts = ["a", "bb", "a", "ccc", "bb"]
    first = Counted()
    answers = JudgeWithLedger(first, Ledger(tmp_path / "deep" / "answers.sqlite")).answers(list(map(question, texts)))
    assert [answer.choice for answer in answers] == [1, 0, 1, 1, 0]
    assert first.asked == ["a", "bb", "ccc"] and first.cost.reused == 2
    again = Counted()
    assert JudgeWithLedger(again, Ledger(tmp_path / "deep" / "answers.sqlite")).answers(list(map(question, texts))) == answers
    assert again.asked == [] and again.cost.reused == 5


def test_answers_before_an_error_are_kept(tmp_path: Path):
    ledger = Ledger(tmp_path / "answers.sqlite")
    with pytest.raises(InputError, match=r"^no more; 2 answers are kept in .*answers.sqlite, run again to go on$"):
        JudgeWithLedger(Counted(most=2), ledger).answers([question("a"), question("b"), question("c")])
    second = Counted()
    JudgeWithLedger(second, ledger).answers([question("a"), question("b"), question("c")])
    assert second.asked == ["c"]


# Everything that an answer depends on is in the key: changing one of them asks anew. The control: an equal question has an equal key.
def test_another_judge_prompt_or_question_has_another_key(monkeypatch: pytest.MonkeyPatch):
    asked, identity = question("a text"), {"model": "one"}
    key = key_of(identity, asked)
    assert key_of({"model": "one"}, question("a text")) == key
    others = [
        key_of({"model": "two"}, asked),
        key_of(identity, replace(asked, explanation="dogs")),
        key_of(identity, replace(asked, task="fuzzing")),
        key_of(identity, replace(asked, choices=("yes", "no"))),
        key_of(identity, replace(asked, texts=(ShownText(("a text",), (True,)),))),
    ]
    monkeypatch.setattr(prompts, "version", lambda task: "changed")
    assert len({key, *others, key_of(identity, asked)}) == 7


@pytest.mark.parametrize(
    "answer",
    [
        Answer("half a pair \ud800 \x00", 1, (0.25, 0.75)),
        Answer("prose that cannot be read"),
        Answer(numbers=(0.1, 1e-17, 10.0)),
    ],
    ids=["choice", "unreadable", "numbers"],
)
def test_an_answer_comes_back_as_it_was(tmp_path: Path, answer: Answer):
    ledger = Ledger(tmp_path / "answers.sqlite")
    assert ledger.get("key") is None
    ledger.put("key", answer)
    ledger.close()
    assert Ledger(tmp_path / "answers.sqlite").get("key") == answer


@pytest.mark.parametrize("content", [b"no database at all, but text" * 100, b"SQLite format 3\x00" + b"\xff" * 5000], ids=["text", "torn"])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "answers.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"^.*answers.sqlite is damaged: move it away, and its questions are asked again \(.*\)$"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_damaged_entry_another_database_and_a_folder_are_one_line(tmp_path: Path):
    ledger = Ledger(tmp_path / "answers.sqlite")
    with sqlite3.connect(ledger.path) as file:
        file.executemany("INSERT INTO answers VALUES (?, ?)", [("a", "[1]"), ("b", "{"), ("c", "[" * 10**5)])
    for key in "abc":
        with pytest.raises(InputError, match=r"is damaged: move it away"):
            ledger.get(key)
    with sqlite3.connect(tmp_path / "other.sqlite") as file:
        file.execute("CREATE TABLE answers (key TEXT)")
    with pytest.raises(InputError, match=r"other.sqlite is no ledger of answers"):
        Ledger(tmp_path / "other.sqlite")
    with pytest.raises(InputError, match=r"cannot be used: unable to open"):
        Ledger(tmp_path)


def test_two_processes_on_one_file_lose_nothing(tmp_path: Path):
    code = (
        "import sys, pathlib\n"
        "from metasae_lightning.judging.judges.ledger import Ledger\n"
        "from metasae_lightning.judging.judges.questions import Answer\n"
        "ledger = Ledger(pathlib.Path(sys.argv[1]))\n"
        "for number in range(100): ledger.put(f'{sys.argv[2]}-{number}', Answer(words=sys.argv[2]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    path = str(tmp_path / "answers.sqlite")
    both = [subprocess.Popen([sys.executable, "-c", code, path, name], env=environment) for name in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    ledger = Ledger(Path(path))
    assert len(ledger) == 200 and ledger.get("a-99") == Answer(words="a") and ledger.get("b-0") == Answer(words="b")


RUN = """
import pathlib, sys
from metasae_lightning.judging.judges.ledger import JudgeWithLedger, Ledger
from metasae_lightning.judging.judges.openai_judge import OpenAIJudge
from tests.judging.test_ledger import MODEL, question
JudgeWithLedger(OpenAIJudge(MODEL, sys.argv[1], concurrency=1), Ledger(pathlib.Path(sys.argv[2]))).answers(
    [question(f"text {number}") for number in range(30)]
)
"""


# The server kills the process when its 13th request comes: 12 were answered, one at a time, and none of them is asked again.
def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path):
    path, running = tmp_path / "answers.sqlite", list[subprocess.Popen[bytes]]()
    with ChatAPI(logprobs=[("yes", -0.1)]) as api:

        def kill_at_the_thirteenth() -> None:
            if len(api.log) == 12:
                running[0].kill()
                running[0].wait()

        api.before = kill_at_the_thirteenth
        running.append(subprocess.Popen([sys.executable, "-c", RUN, api.url, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)}))
        assert running[0].wait() == -9
        answered = [request.user for request in api.log[:12]]
        assert len(Ledger(path)) == len(set(answered)) == 12
        api.before = lambda: None
        again = JudgeWithLedger(OpenAIJudge(MODEL, api.url), Ledger(path))
        assert all(answer.choice == 1 for answer in again.answers([question(f"text {number}") for number in range(30)]))
        assert again.cost.requests == 18 and again.cost.reused == 12
        times = Counter(request.user for request in api.log)
        assert len(times) == 30 and all(times[user] == 1 for user in answered)

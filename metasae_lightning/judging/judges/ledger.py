"""The ledger: a file in which every answer of a judge is kept, so that a run that was stopped asks no question twice."""

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from metasae_lightning.errors import InputError, one_line
from metasae_lightning.judging.judges import prompts
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.questions import Answer, Question

# Marks a SQLite file as a ledger of this format.
APPLICATION_ID = 0x6D736A31
# Seconds to wait for another process that is writing.
LOCK_TIMEOUT = 60.0


class Ledger:
    """Answers in an SQLite file, each written as soon as it comes. Several processes may use one file.

    A key is a hash of the judge's identity, the version of the task's prompt, and the question as the prompt shows it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None)
            # A written answer survives a crash of this process. Only a crash of the machine may lose the last answers.
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
        try:
            with self._errors():
                self._open()
        except InputError:
            self._file.close()
            raise

    def _open(self) -> None:
        """Check that the file is a ledger; an empty file becomes one."""
        self._file.execute("BEGIN IMMEDIATE")
        if not self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._file.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._file.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID")
        self._file.execute("COMMIT")
        if self._file.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise InputError(f"{self.path} is no ledger of answers, but another program's database")

    @contextlib.contextmanager
    def _errors(self) -> Generator[None, None, None]:
        """Turn an error in the use of the file into an `InputError` of one line."""
        try:
            yield
        except sqlite3.OperationalError as error:
            raise InputError(f"{self.path} cannot be used: {one_line(error)}") from error
        except (sqlite3.Error, ValueError, TypeError, LookupError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{self.path} is damaged: move it away, and its questions are asked again ({one_line(error)})") from error

    def get(self, key: str) -> Answer | None:
        """The kept answer with a key; None if there is none."""
        with self._errors():
            row = self._file.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
            return None if row is None else _answer_of(json.loads(row[0]))

    def put(self, key: str, answer: Answer) -> None:
        """Write an answer. After the call it survives a crash of this process."""
        with self._errors():
            # JSON in ASCII, because a server can send half a surrogate pair, which SQLite refuses.
            self._file.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, json.dumps(asdict(answer))))

    def __len__(self) -> int:
        with self._errors():
            return self._file.execute("SELECT count(*) FROM answers").fetchone()[0]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _answer_of(content: Any) -> Answer:
    """The answer in an entry's JSON. A damaged entry raises a `LookupError`, `TypeError` or `ValueError`."""
    choice = content["choice"]
    probabilities, numbers = (tuple(map(float, content[name])) for name in ("probabilities", "numbers"))
    return Answer("".join(content["words"]), None if choice is None else int(choice), probabilities, numbers)


def key_of(identity: dict[str, Any], question: Question) -> str:
    """The key of a judge's answer to a question."""
    shown = [identity, prompts.version(question.task), prompts.messages(question), question.choices, question.numbers]
    return hashlib.blake2b(json.dumps(shown, sort_keys=True).encode(), digest_size=16).hexdigest()


@final
class JudgeWithLedger(Judge):
    """A judge with a ledger. It is asked only questions that the ledger does not hold, each once; answers are kept as they come.

    An unreadable answer is kept too, and so is an empty one that was paid for. A missing answer is not: the next run asks again.
    """

    def __init__(self, judge: Judge, ledger: Ledger) -> None:
        super().__init__()
        self.judge, self.ledger = judge, ledger
        self.tasks, self.cost = judge.tasks, judge.cost

    @property
    def identity(self) -> dict[str, Any]:
        return self.judge.identity

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        identity = self.identity
        keys = [key_of(identity, question) for question in questions]
        by_key = {key: answer for key in dict.fromkeys(keys) if (answer := self.ledger.get(key)) is not None}
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in by_key}
        self.cost.reused += len(questions) - len(missing)
        try:
            for key, answer in self._asked(missing):
                by_key[key] = answer
        except InputError as error:
            raise type(error)(f"{error}; {len(self.ledger)} answers are kept in {self.ledger.path}, run again to go on") from None
        return [by_key[key] for key in keys]

    def _asked(self, missing: dict[str, Question]) -> Iterator[tuple[str, Answer]]:
        """Keys and new answers, as they come. Each answer is in the ledger before it is yielded."""
        keys = list(missing)
        for index, answer in self.judge.stream_answers(list(missing.values())):
            if not answer.is_missing:
                self.ledger.put(keys[index], answer)
            yield keys[index], answer

"""A judge behind a server with OpenAI's chat interface: OpenAI itself, vLLM, llama.cpp, Ollama and others."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, final

from metasae_lightning.errors import InputError
from metasae_lightning.judging.judges.chat_reply import choice_probabilities
from metasae_lightning.judging.judges.chat_server import ChatServer, QuestionRefused
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.prompts import messages
from metasae_lightning.judging.judges.questions import Answer, Question, Task
from metasae_lightning.judging.judges.reading import answer_length, read_answer

# After this many refused questions, and no answer, the server is taken to refuse every question.
REFUSALS_BEFORE_ERROR = 10

log = logging.getLogger(__name__)


@final
class OpenAIJudge(Judge):
    """A model behind a server with OpenAI's chat interface.

    Choices are read from log-probabilities where the server gives them, and otherwise from what the model writes.

    Args:
        model: The server's name of the model.
        url: Address of the interface, such as `http://127.0.0.1:8000/v1`.
        key_variable: Environment variable that holds the key. If it is not set, requests are sent without a key.
        concurrency: Requests at a time.
        timeout: Seconds to wait for data from the server before a request counts as failed.
        retries: Times that a failed request is sent again.
        backoff: Seconds before a failed request is sent again, doubled after each failure. A wait that the server asks for replaces it.
        max_requests: Requests at most, repeated ones included.
        max_tokens: Tokens of questions and answers after which no request is sent. Requests under way may exceed it.
            Where a server does not count tokens, they are estimated, one for four characters.
        answer_tokens: Tokens of an answer at most. Default: what the task needs. A model that reasons first needs more.
    """

    tasks = frozenset[Task](("explanation", "detection", "fuzzing", "replacement_2afc", "strength", "simulation", "intruder"))

    def __init__(
        self,
        model: str,
        url: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 1.0,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        answer_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.concurrency, self.answer_tokens = concurrency, answer_tokens
        self.server = ChatServer(
            model,
            url,
            key_variable=key_variable,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            max_requests=max_requests,
            max_tokens=max_tokens,
            cost=self.cost,
        )
        self._lock = threading.Lock()
        self._answered, self._refused = 0, 0

    @property
    def identity(self) -> dict[str, Any]:
        server = self.server
        return {"judge": "openai", "url": server.url, "model": server.model, "temperature": 0, "answer_tokens": self.answer_tokens}

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        by_index = dict(self.stream_answers(questions))
        return [by_index[index] for index in range(len(questions))]

    def stream_answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Indices of questions with their answers, as they come. An error is raised only after the requests under way have ended."""
        waiting, running, failures = iter(enumerate(questions)), dict[Future[Answer], int](), list[BaseException]()
        self.server.stopped.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                while True:
                    while not failures and len(running) < self.concurrency and (item := next(waiting, None)) is not None:
                        running[pool.submit(self._ask, item[1])] = item[0]
                    if not running:
                        break
                    start = time.monotonic()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    self.cost.seconds += time.monotonic() - start
                    for future in done:
                        index, error = running.pop(future), future.exception()
                        if error is None:
                            yield index, future.result()
                        else:
                            failures.append(error)
                            self.server.stopped.set()
            finally:
                self.server.stopped.set()
        if failures:
            raise failures[0]

    def _ask(self, question: Question) -> Answer:
        """The answer to one question; a missing one if the server refuses it, or sends nothing and counts no tokens."""
        length = self.answer_tokens or answer_length(question)
        try:
            reply = self.server.reply(messages(question), length, logprobs=bool(question.choices))
        except QuestionRefused as error:
            return self._note_refused(str(error))
        with self._lock:
            self._answered += 1
        answer = read_answer(question, reply.words)
        probabilities = choice_probabilities(question.choices, reply.alternatives)
        if not probabilities:
            return answer if reply.words or reply.is_counted else Answer(is_missing=True)
        return Answer(answer.words, max(range(len(probabilities)), key=probabilities.__getitem__), probabilities)

    def _note_refused(self, said: str) -> Answer:
        """A missing answer, with a warning for the first refused question. Without any answer, many refusals are an `InputError`."""
        with self._lock:
            self._refused += 1
            if not self._answered and self._refused >= REFUSALS_BEFORE_ERROR:
                raise InputError(f"url: {self.server.url} refuses every question: {said}")
            if self._refused == 1:
                log.warning("%s refuses a question, which counts as unreadable: %s", self.server.url, said)
        return Answer(is_missing=True)

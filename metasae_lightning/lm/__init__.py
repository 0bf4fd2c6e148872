"""Language models, read and edited at named hooks."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.lm.backends import HuggingFaceLM, TransformerLensLM
    from metasae_lightning.lm.base import LanguageModel

__all__ = ["HuggingFaceLM", "LanguageModel", "TransformerLensLM"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["HuggingFaceLM", "TransformerLensLM"], "metasae_lightning.lm.backends"),
        "LanguageModel": "metasae_lightning.lm.base",
    },
)

"""Text sources, and tokenization: text in, contexts of tokens out."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.corpora.base import Corpus, Split, check_held_out, split_of
    from metasae_lightning.corpora.python_docs import PythonDocs
    from metasae_lightning.corpora.sources import HubText, InMemory, SavedDataset, TextFiles

__all__ = ["Corpus", "HubText", "InMemory", "PythonDocs", "SavedDataset", "Split", "TextFiles", "check_held_out", "split_of"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["Corpus", "Split", "check_held_out", "split_of"], "metasae_lightning.corpora.base"),
        "PythonDocs": "metasae_lightning.corpora.python_docs",
        **dict.fromkeys(["HubText", "InMemory", "SavedDataset", "TextFiles"], "metasae_lightning.corpora.sources"),
    },
)

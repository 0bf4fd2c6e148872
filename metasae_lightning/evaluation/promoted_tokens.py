"""The tokens whose logits a latent's decoder row raises and lowers most, through the model's unembedding."""

from collections.abc import Sequence
from typing import Any

import torch

from metasae_lightning.evaluation.result_cache import Entry
from metasae_lightning.evaluation.saes import EvaluatedSAE
from metasae_lightning.evaluation.top_contexts import Spelling

# Number of promoted tokens, and of suppressed ones.
TOKENS = 10
# Logits in memory at once: 256 MiB of float32.
LOGITS = 2**26


def promoted_tokens(subject: EvaluatedSAE, model: Any, latents: Sequence[int]) -> dict[str, dict[str, list[str]]]:
    """Texts of the tokens that some latents promote and suppress, most first. Empty if the SAE does not read the residual stream.

    They follow from the row's direct effect on the logits: no layer after the hook has a part in it. `model` is the loaded language model.
    """
    rows = subject.W_dec
    if any(name.endswith("hook_z") for name in subject.hook_names) or model.logits_of_directions(rows[:1]) is None:
        return {}

    def extremes() -> Entry:
        chunk = max(1, LOGITS // model.logits_of_directions(rows[:1]).shape[1])
        ends = [_extremes(model.logits_of_directions(rows[begin : begin + chunk])) for begin in range(0, len(rows), chunk)]
        return {name: torch.cat([end[name] for end in ends]) for name in ends[0]}

    key = {**subject.decoder_cache_key, "model": model.description(), "count": TOKENS}
    if subject.by_polarity:  # twice as many rows
        key["by_polarity"] = True
    entry, spelling = subject.result_cache.get_or_compute("promoted", key, extremes), Spelling(model.tokenizer)
    return {
        name: {str(latent): [spelling.token_texts([token])[0] for token in tokens[latent].tolist()] for latent in latents}
        for name, tokens in entry.items()
    }


def _extremes(logits: torch.Tensor) -> Entry:
    """The tokens with the largest and the smallest logits of each row."""
    count = min(TOKENS, logits.shape[1])
    return {"promoted": logits.topk(count).indices.int(), "suppressed": logits.topk(count, largest=False).indices.int()}

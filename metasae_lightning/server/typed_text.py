"""Where latents fire on a typed text, and how its continuation changes when a latent's decoder row is added to the activations."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from metasae_lightning.errors import InputError, did_you_mean
from metasae_lightning.evaluation.saes import EvaluatedSAE
from metasae_lightning.evaluation.steering import SteeredModel, change_latents
from metasae_lightning.evaluation.text_reader import TextReader
from metasae_lightning.evaluation.top_contexts import Spelling
from metasae_lightning.lm.base import LanguageModel

# Latents shown for one token, tokens of a continuation, and strength of a steered latent, at most.
MAX_LATENTS, MAX_TOKENS, MAX_STRENGTH = 32, 64, 1e6


@dataclass(frozen=True)
class ServedSAEs:
    """SAEs of one hook, with the complete language model."""

    reader: TextReader
    """Reader of texts with the complete language model."""
    saes: Mapping[str, EvaluatedSAE]
    """The SAEs by name."""

    def description(self) -> dict[str, Any]:
        """The names and limits that the page shows."""
        arms = [{"name": name, "latents": len(sae.W_dec)} for name, sae in self.saes.items()]
        return {"model": self.model.name, "hook": self.model.hooks[0], "arms": arms, "tokens": MAX_TOKENS}

    @property
    def model(self) -> LanguageModel:
        """The complete language model."""
        return self.reader.model

    def firings(self, text: str) -> dict[str, Any]:
        """The tokens of a text, and for each SAE the latents that fire on each token, strongest first, at most `MAX_LATENTS`."""
        tokens = self.reader.tokens(text)[None]
        activations, is_read = self.model.activations(tokens)[0], self.reader.is_trained_on(tokens)[0].tolist()
        arms: list[dict[str, Any]] = []
        for name, sae in self.saes.items():
            codes, _ = sae.encode_decode(activations)
            by_token: list[list[tuple[int, float]]] = [[] for _ in is_read]
            for row, latent, value in zip(codes.rows.tolist(), codes.latents.tolist(), codes.values.tolist(), strict=True):
                if is_read[row]:
                    by_token[row].append((latent, float(f"{value:.4g}")))
            arms.append({"name": name, "firings": [sorted(found, key=lambda firing: -firing[1])[:MAX_LATENTS] for found in by_token]})
        return {"tokens": Spelling(self.model.tokenizer).token_texts(tokens[0].tolist()), "read": is_read, "arms": arms}

    def continuations(self, text: str, arm: str, latent: int, strength: float, count: int) -> dict[str, Any]:
        """Two greedy continuations of a text: unchanged, and with `strength` added to a latent's activation.

        It is added at every token that the SAEs are trained on, also in the continuation. The SAE's reconstruction error stays, so this
        adds `strength` times the latent's decoder row to the model's activations. Where a group of latents is one, that is the direction
        of the group.
        """
        if arm not in self.saes:
            raise InputError(f"arm: there is no {arm!r}{did_you_mean(arm, self.saes)}")
        d_sae = len(self.saes[arm].W_dec)
        if not 0 <= latent < d_sae:
            raise InputError(f"latent must be in 0 to {d_sae - 1}, got {latent}")
        if not (math.isfinite(strength) and abs(strength) <= MAX_STRENGTH):
            raise InputError(f"strength must be in -{MAX_STRENGTH:g} to {MAX_STRENGTH:g}, got {strength}")
        if not 1 <= count <= MAX_TOKENS:
            raise InputError(f"count must be in 1 to {MAX_TOKENS}, got {count}")
        tokens = self.reader.tokens(text)
        if len(tokens) == self.reader.batching.context_size:
            raise InputError(f"text fills the context of {len(tokens)} tokens: nothing can follow")
        sae = self.saes[arm]
        numbers = {index: strength * code for index, code in sae.units.codes_of_direction(latent, sae.decoder_rows).items()}
        steered_model = SteeredModel(self.reader, sae.sae, partial(change_latents, numbers=numbers))
        plain, steered = (self.reader.greedy(tokens, count, edit_of) for edit_of in (None, steered_model.edit))
        texts = {"plain": self.reader.text_after(tokens, plain), "steered": self.reader.text_after(tokens, steered)}
        return {**texts, "tokens": [len(plain), len(steered)]}

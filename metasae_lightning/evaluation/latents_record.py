"""The record of single latents, `latents.json.gz`, that the report's latent browser reads."""

from typing import Any

import torch

from metasae_lightning.evaluation.collect import CollectedCodes
from metasae_lightning.evaluation.evaluate import phi_of_pairs
from metasae_lightning.evaluation.examples import Activations, examples_record, shown_histograms
from metasae_lightning.evaluation.top_contexts import top_contexts

# Bins of a latent's activations from 0 to the largest.
HISTOGRAM_BINS = 16


def latents_record(collected: CollectedCodes, tokenizer: Any | None, *, count: int = 3, memory_gib: float = 2.0) -> dict[str, Any]:
    """Number of firings and largest activation of every latent; of live latents also histogram, co-firing partners, and texts.

    `contexts` has the strongest firing in each of the `count` best documents, `examples` firings from the strongest to the weakest. Both
    are empty without a tokenizer or with a `count` of 0. `memory_gib` bounds the memory for counting pairs of latents.
    """
    width = len(collected.subject.W_dec)
    firings = torch.zeros(width, dtype=torch.long, device=collected.device)
    maximum = torch.zeros(width, device=collected.device)
    for codes, _ in collected.codes(collected.device):
        firings += codes.firings()
        maximum = maximum.scatter_reduce(0, codes.latents, codes.values, "amax")
    firings, maximum = firings.cpu(), maximum.cpu()
    live, activations = firings.nonzero().flatten().tolist(), Activations.of(collected, maximum)
    has_text = tokenizer is not None and count
    contexts = top_contexts(collected, live, tokenizer, count=count) if has_text else {}
    return {
        **collected.subject.decoder_cache_key,
        **{"weights": collected.subject.cache_key["sae"], "tokens": int(collected.reconstruction.tokens)},
        **({"by_polarity": True} if collected.subject.by_polarity else {}),
        **{"firings": firings.tolist(), "maximum": [float(f"{value:.4g}") for value in maximum.tolist()]},
        "histograms": shown_histograms(activations, HISTOGRAM_BINS),
        "partners": partners(collected, live, memory_gib),
        "contexts": {str(latent): [vars(context) for context in contexts[latent]] for latent in sorted(contexts)},
        **(examples_record(collected, activations, tokenizer, strongest=count) if has_text else {}),
    }


def partners(collected: CollectedCodes, latents: list[int], memory_gib: float) -> dict[str, list[list[float]]]:
    """The latents that each of these latents fires together with most, and their phi, where it is more than 0."""
    entry = phi_of_pairs(collected, memory_gib)
    index, phi = entry["partners"].tolist(), entry["partner_phi"].tolist()
    return {
        str(latent): [[other, round(value, 3)] for other, value in zip(index[latent], phi[latent], strict=True) if value > 0]
        for latent in latents
    }

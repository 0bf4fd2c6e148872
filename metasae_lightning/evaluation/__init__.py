"""SAEs measured and compared on held-out text, and the activations of their latents on texts of your own."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from metasae_lightning.evaluation.latents import HeldOutContext, Latents, TextActivations, open_latents

__all__ = ["HeldOutContext", "Latents", "TextActivations", "open_latents"]
__getattr__, __dir__ = lazy_exports(__name__, dict.fromkeys(__all__, "metasae_lightning.evaluation.latents"))

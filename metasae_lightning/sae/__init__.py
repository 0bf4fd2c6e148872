"""One SAE: build, run, train, convert, save and publish it. The only package that imports SAELens for SAEs."""

from typing import TYPE_CHECKING

from metasae_lightning.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from sae_lens import BatchTopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    from metasae_lightning.sae.export import ExportRecord
    from metasae_lightning.sae.pretrained import load_pretrained

__all__ = ["BatchTopKTrainingSAEConfig", "ExportRecord", "SAEMetadata", "TrainingSAE", "TrainingSAEConfig", "load_pretrained"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["BatchTopKTrainingSAEConfig", "TrainingSAE", "TrainingSAEConfig"], "sae_lens"),
        "SAEMetadata": "sae_lens.saes.sae",
        "ExportRecord": "metasae_lightning.sae.export",
        "load_pretrained": "metasae_lightning.sae.pretrained",
    },
)

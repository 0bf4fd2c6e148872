"""One SAE: build, run, train, convert, save and publish it. The only package that imports SAELens for SAEs."""

from sae_lens import BatchTopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from metasae_lightning.sae.conversion import adopt
from metasae_lightning.sae.export import ExportRecord, export
from metasae_lightning.sae.forward import LATENTS, BatchCut, Kernels, passes_of
from metasae_lightning.sae.pretrained import build, load_pretrained, measure, pre_activations, set_k, set_thresholds
from metasae_lightning.sae.publish import README, RECORD, publish, stage

__all__ = [
    "LATENTS",
    "README",
    "RECORD",
    "BatchCut",
    "BatchTopKTrainingSAEConfig",
    "ExportRecord",
    "Kernels",
    "SAEMetadata",
    "TrainingSAE",
    "TrainingSAEConfig",
    "adopt",
    "build",
    "export",
    "load_pretrained",
    "measure",
    "passes_of",
    "pre_activations",
    "publish",
    "set_k",
    "set_thresholds",
    "stage",
]

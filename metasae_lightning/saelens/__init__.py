"""The one door to SAELens: build a training SAE, run it, start it from a published one, save it and publish it."""

from sae_lens import BatchTopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata

from metasae_lightning.saelens.conversion import adopt
from metasae_lightning.saelens.export import ExportRecord, export
from metasae_lightning.saelens.inference import load_pretrained, measure, pre_activations, set_thresholds
from metasae_lightning.saelens.passes import LATENTS, BatchCut, Kernels, passes_of
from metasae_lightning.saelens.publish import README, RECORD, publish, stage
from metasae_lightning.saelens.training import build, set_k

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

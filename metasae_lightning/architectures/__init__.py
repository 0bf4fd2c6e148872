"""SAE architectures that SAELens lacks, and the units of an SAE. Importing this package registers them with SAELens."""

from metasae_lightning.architectures.adaptive_elastic_net import AdaptiveElasticNetTrainingSAEConfig
from metasae_lightning.architectures.paper_gated import PaperGatedTrainingSAEConfig
from metasae_lightning.architectures.signed_gated import SignedGatedTrainingSAEConfig
from metasae_lightning.architectures.sparsemax import SparsemaxTrainingSAEConfig
from metasae_lightning.architectures.subspace import SubspaceTrainingSAEConfig
from metasae_lightning.architectures.units import Units

__all__ = [
    "AdaptiveElasticNetTrainingSAEConfig",
    "PaperGatedTrainingSAEConfig",
    "SignedGatedTrainingSAEConfig",
    "SparsemaxTrainingSAEConfig",
    "SubspaceTrainingSAEConfig",
    "Units",
]

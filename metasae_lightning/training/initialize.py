"""The start of training: both SAEs are initialised from the first batch."""

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.compute.sharding import full
from metasae_lightning.sae.init_from import InitReport
from metasae_lightning.sae.learner import Learner


def initialize_saes(primary: Learner, meta: Learner | None, activations: Tensor, ranks: ProcessGroup) -> None:
    """Initialise each SAE that is not yet: the primary on the first batches of all ranks, the meta SAE on the primary's decoder rows."""
    if not primary.initialized:
        _log(primary.initialize(ranks.all_gather_rows(activations)), "primary")
    if meta is not None and primary.initialized and not meta.initialized:  # before its first use as critic
        _log(meta.initialize(functional.unit_rows(full(primary.W_dec.detach()))), "meta")


def _log(report: InitReport | None, role: str) -> None:
    """Log which SAE an SAE was initialised from."""
    if report is not None:
        rank_zero_info(f"{role} {report}")

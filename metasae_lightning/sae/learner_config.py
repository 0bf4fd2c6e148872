"""How a learner trains its SAE."""

from dataclasses import dataclass
from typing import Literal

from metasae_lightning.sae.forward import Kernels
from metasae_lightning.sae.head_loss import HeadTraining
from metasae_lightning.sae.init_from import InitFrom


@dataclass(frozen=True)
class LearnerConfig:
    """How a learner trains its SAE, apart from the SAE's own SAELens config."""

    dead_after: int
    """A latent that was silent for this many rows is dead."""
    decoder_rows: Literal["unit", "free"] = "unit"
    """`unit`: remove the radial part of the decoder's gradient and renormalise the rows after each step. `free`: do neither."""
    b_dec_init: Literal["zeros", "mean", "geometric_median"] = "zeros"
    """The decoder bias, computed from the first rows."""
    micro_batches: int = 1
    """Number of parts that the rows of a step are split into; their gradients are accumulated."""
    clip_grad_norm: float | None = None
    """Largest norm of the SAE's gradient; None does not clip."""
    kernels: Kernels = "sparse"
    """`sparse`: kernels that skip zeros, for the top-k family. `dense`: SAELens's own forward pass."""
    n_fixed_rows: int = 0
    """Number of rows of a batch that holds the same, slowly moving rows at every call (decoder rows); 0 for new rows at every call."""
    init_from: InitFrom | None = None
    """The SAE whose weights training starts from."""
    head_training: HeadTraining = "joint"
    """How a head is trained with the SAE, where there is one."""
    cuda_graph: bool = False
    """On a GPU, compute the gradients of equal steps by a CUDA graph, where that is possible and pays."""

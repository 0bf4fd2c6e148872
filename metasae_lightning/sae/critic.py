"""The meta SAE as the critic of a penalty."""

from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metasae_lightning.compute.process_group import ProcessGroup
from metasae_lightning.sae.learner import Learner
from metasae_lightning.step import Codes


class LearnerCritic:
    """A learner as a function from unit decoder rows to their reconstruction, without gradient and without any change of its state.

    Args:
        learner: The meta SAE.
        reuse_support: Keep the active latents of the first call since the learner's last step.
    """

    def __init__(self, learner: Learner, *, reuse_support: bool = False) -> None:
        self._learner, self._reuse_support = learner, reuse_support

    def __call__(self, rows: Float[Tensor, "row d_in"], /, blocks: Int[Tensor, " row"] | None = None) -> Float[Tensor, "row d_in"]:
        """The reconstruction, in a buffer that the next call may overwrite.

        With `blocks`, the block of each row, meta latents that are active on rows of one block alone are left out. The rows are those of
        all ranks.
        """
        keep = None if blocks is None else partial(in_several_blocks, blocks=blocks, ranks=self._learner.parallelism.world)
        return self._learner.read(rows, reuse_support=self._reuse_support, reuse_output=True, keep=keep)[1]


def in_several_blocks(codes: Codes, *, blocks: Int[Tensor, " row"], ranks: ProcessGroup) -> Bool[Tensor, " nnz"]:
    """Which of the nonzeros are of a latent that is active on rows of at least two blocks, over the rows of all ranks.

    >>> codes = Codes.from_dense(torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    >>> in_several_blocks(codes, blocks=torch.tensor([0, 0, 1]), ranks=ProcessGroup()).tolist()
    [False, True, False, True, False]
    """
    of_nonzeros = blocks[codes.rows]
    first = blocks.new_full((codes.shape[1],), torch.iinfo(blocks.dtype).max).scatter_reduce_(0, codes.latents, of_nonzeros, "amin")
    last = blocks.new_full((codes.shape[1],), -1).scatter_reduce_(0, codes.latents, of_nonzeros, "amax")
    ranks.all_reduce_min_(first)
    ranks.all_reduce_max_(last)
    return (first != last)[codes.latents]

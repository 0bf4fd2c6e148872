"""Formulas of subspaces: groups of latents that are gated as one (arXiv 2606.06333), and norms of their decoder blocks.

Dims: `group` groups of `latent` latents each.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

EPS = 1e-6
"""Number that is added to the eigenvalues of a Gram matrix before its root is inverted."""


def group_norms(acts: Float[Tensor, "row d_sae"], group_size: int) -> Float[Tensor, "row group"]:
    """The Euclidean norm of the activations of each group of `group_size` consecutive latents.

    >>> group_norms(torch.tensor([[3.0, -4.0, 0.0, 2.0]]), 2).tolist()
    [[5.0, 2.0]]
    """
    return acts.unflatten(-1, (-1, group_size)).norm(dim=-1)


def top_groups(norms: Float[Tensor, "row group"], k: float, *, of_batch: bool) -> Bool[Tensor, "row group"]:
    """Mask of the `k` largest norms of each row, or with `of_batch` of the `k * rows` largest norms of all rows.

    >>> top_groups(torch.tensor([[5.0, 2.0, 4.0], [1.0, 0.5, 0.0]]), 1, of_batch=False).tolist()
    [[True, False, False], [True, False, False]]
    >>> top_groups(torch.tensor([[5.0, 2.0, 4.0], [1.0, 0.5, 0.0]]), 1, of_batch=True).tolist()
    [[True, False, True], [False, False, False]]
    """
    scores = norms.flatten()[None] if of_batch else norms
    count = int(k * len(norms)) if of_batch else int(k)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(1, scores.topk(count, sorted=False).indices, True).view(norms.shape)


@torch.no_grad()
def polar_factor(blocks: Float[Tensor, "group latent d_in"], eps: float = EPS) -> Float[Tensor, "group latent d_in"]:
    """The polar factor `(D D^T + eps I)^(-1/2) D` of each block D, without gradient.

    For `eps = 0` and independent rows it is `U V^T` of the singular value decomposition `D = U S V^T`.

    >>> polar_factor(torch.tensor([[[3.0, 0.0], [0.0, -2.0]]]), eps=0.0).tolist()
    [[[1.0, 0.0], [0.0, -1.0]]]
    """
    return _power(blocks @ blocks.mT, -0.5, eps) @ blocks


def nuclear_norm(blocks: Float[Tensor, "group latent d_in"], eps: float = EPS) -> Float[Tensor, ""]:
    """The mean over groups of `sum(D * P)`, with the polar factor P as its gradient in the block D.

    For `eps = 0` and independent rows it is the mean nuclear norm, the sum of singular values, and P is its gradient.

    >>> nuclear_norm(torch.tensor([[[3.0, 0.0], [0.0, -2.0]]]), eps=0.0).item()
    5.0
    """
    return (blocks * polar_factor(blocks, eps)).sum() / len(blocks)


def composition_norm(
    encoders: Float[Tensor, "group latent d_in"], decoders: Float[Tensor, "group latent d_in"], eps: float = EPS
) -> Float[Tensor, ""]:
    """The mean over groups of the nuclear norm of `E^T D`, the map from an activation to the group's part of its reconstruction.

    E holds a group's encoder columns as rows, D its decoder rows. The d_in x d_in product is not formed: with `A = E E^T + eps I`,
    `B = D D^T`, `S = A^(1/2) B A^(1/2) + eps I` and `C = A^(1/2) S^(-1/2) A^(1/2)`, the norm is `tr(C B)`, its gradient in D is `C D`,
    and its gradient in E is `B C A^(-1) E`.

    >>> composition_norm(torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]]), eps=0.0).item()
    6.0
    """
    with torch.no_grad():
        B, A = decoders @ decoders.mT, encoders @ encoders.mT
        root = _power(A, 0.5, eps)
        C = root @ _power(root @ B @ root, -0.5, eps) @ root
        of_decoders, of_encoders = C @ decoders, B @ C @ _power(A, -1, eps) @ encoders
    # The norm is linear in D and linear in E, so the two terms have its gradient each; the second adds nothing to its value.
    return ((decoders * of_decoders).sum() + ((encoders - encoders.detach()) * of_encoders).sum()) / len(decoders)


def _power(gram: Float[Tensor, "group latent latent"], exponent: float, eps: float) -> Float[Tensor, "group latent latent"]:
    """A power of `gram + eps I`, for symmetric matrices without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * (values.clamp(min=0) + eps).pow(exponent)[..., None, :]) @ vectors.mT

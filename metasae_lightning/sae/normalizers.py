"""SAELens's five normalisers of activations, applied before an SAE and undone after it, as modules outside the SAE.

They are outside because then every loss, the auxiliary one too, is in one space, and because `fold` puts each into an exported SAE.
"""

from abc import ABC, abstractmethod
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metasae_lightning.compute.row_passes import centred_rows
from metasae_lightning.errors import InputError

NAMES = ("none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening")
"""SAELens's names of the normalisers."""
Undo = tuple[Tensor, ...]
"""What `restore` needs of each token to take a reconstruction back to raw space."""


class Normalizer(nn.Module, ABC):
    """A map from raw activations to an SAE's normalised space, and back."""

    per_token: str | None = None
    """SAELens's name of a per-token normaliser, which inference repeats; None for an affine map, which is folded into the weights."""
    shifts: bool = False
    """Whether it is an affine map with a shift."""

    def fit(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Estimate the statistics from a sample; per-token normalisers have none."""

    @abstractmethod
    def normalize(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Undo]:
        """The SAE's input, and what `restore` needs."""

    @abstractmethod
    def restore(self, z: Float[Tensor, "batch d_in"], undo: Undo) -> Float[Tensor, "batch d_in"]:
        """The reconstruction in raw space."""

    @abstractmethod
    def fold(self, sae: Any) -> None:
        """Change a SAELens SAE for normalised activations, in place, into one for raw activations."""

    def unfold(self, weights: dict[str, Tensor]) -> None:
        """The inverse of `fold`: change weights for raw activations, in place, into weights for normalised ones.

        With `shifts` the encoder must subtract `b_dec` from its input.
        """


@final
class Identity(Normalizer):
    """`none`: the SAE sees raw activations."""

    def normalize(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Undo]:
        """The activations themselves."""
        return x, ()

    def restore(self, z: Float[Tensor, "batch d_in"], undo: Undo) -> Float[Tensor, "batch d_in"]:
        """The reconstruction itself."""
        return z

    def fold(self, sae: Any) -> None:
        """Change nothing: the SAE already works on raw activations."""


@final
class LayerNorm(Normalizer):
    """`layer_norm`: each token centred and divided by its standard deviation, as SAELens does it at inference."""

    per_token = "layer_norm"

    def normalize(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Undo]:
        """Each token minus its mean, divided by its standard deviation plus 1e-5."""
        centred, mean, std = centred_rows(x)
        return centred / (std + 1e-5), (std, mean)

    def restore(self, z: Float[Tensor, "batch d_in"], undo: Undo) -> Float[Tensor, "batch d_in"]:
        """`z` times the token's standard deviation, plus its mean."""
        std, mean = undo
        return torch.addcmul(mean, z, std)

    def fold(self, sae: Any) -> None:
        """Set the config so that SAELens normalises each token at inference."""
        sae.cfg.normalize_activations = "layer_norm"


@final
class ConstantNorm(Normalizer):
    """`constant_norm_rescale`: each token scaled to norm `sqrt(d_in)`."""

    per_token = "constant_norm_rescale"

    def normalize(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Undo]:
        """Each token divided by its norm over `sqrt(d_in)`."""
        scale = x.norm(dim=-1, keepdim=True).clamp(min=1e-12) / x.shape[-1] ** 0.5
        return x / scale, (scale,)

    def restore(self, z: Float[Tensor, "batch d_in"], undo: Undo) -> Float[Tensor, "batch d_in"]:
        """`z` times the token's scale."""
        return z * undo[0]

    def fold(self, sae: Any) -> None:
        """Set the config so that SAELens rescales each token at inference."""
        sae.cfg.normalize_activations = "constant_norm_rescale"


@final
class ExpectedAverage(Normalizer):
    """`expected_average_only_in`: one factor for all tokens, by which their mean norm becomes `sqrt(d_in)`."""

    factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.zeros((), dtype=torch.float64))

    def fit(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Set the factor to `sqrt(d_in)` over the mean norm of the sample."""
        self.factor.fill_(x.shape[-1] ** 0.5 / x.double().norm(dim=-1).mean().item())

    def normalize(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Undo]:
        """`x * factor`."""
        return x * self.factor, ()

    def restore(self, z: Float[Tensor, "batch d_in"], undo: Undo) -> Float[Tensor, "batch d_in"]:
        """`z / factor`."""
        return z * (1 / self.factor.to(z.dtype))

    def fold(self, sae: Any) -> None:
        """Fold the factor into the weights with SAELens's method."""
        sae.fold_activation_norm_scaling_factor(self.factor.item())

    def unfold(self, weights: dict[str, Tensor]) -> None:
        """Substitute `x = z / factor` in the weights."""
        factor = self.factor.item()
        weights["b_dec"] *= factor
        if "W_enc" in weights:  # without an encoder (matching pursuit), decoder rows are directions, which a factor does not change
            weights["W_dec"] *= factor
            weights["W_enc"] /= factor


@final
class Whitening(Normalizer):
    """`covariance_whitening`: mean zero and identity covariance (arXiv 2511.13981), estimated on the sample."""

    shifts = True

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    def __init__(self, d_in: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("mean", torch.zeros(d_in, dtype=torch.float64))
        self.register_buffer("matrix", torch.zeros(d_in, d_in, dtype=torch.float64))
        self.register_buffer("inverse", torch.zeros(d_in, d_in, dtype=torch.float64))

    def fit(self, x: Float[Tensor, "batch d_in"]) -> None:
        """`M = E (L + eps)^(-1/2)` from the covariance `E L E^T`. A sample of fewer than `2 d_in` tokens is an error."""
        batch, d_in = x.shape
        if batch < 2 * d_in:
            raise InputError(
                f"covariance_whitening estimates {d_in} x {d_in} numbers and needs a first batch of at least {2 * d_in}, got {batch}"
            )
        self.mean.copy_(x.double().mean(0))
        values, vectors = torch.linalg.eigh(torch.cov(x.double().T))
        values = values.clamp(min=0) + self.eps
        self.matrix.copy_(vectors * values.rsqrt())
        self.inverse.copy_(values.sqrt()[:, None] * vectors.T)

    def normalize(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, "batch d_in"], Undo]:
        """`z = (x - mean) M`."""
        return (x - self.mean.to(x.dtype)) @ self.matrix.to(x.dtype), ()

    def restore(self, z: Float[Tensor, "batch d_in"], undo: Undo) -> Float[Tensor, "batch d_in"]:
        """`x = z M^-1 + mean`."""
        return z @ self.inverse.to(z.dtype) + self.mean.to(z.dtype)

    def fold(self, sae: Any) -> None:
        """Fold mean and matrix into the weights with SAELens's method."""
        sae.fold_activation_whitening(mean=self.mean, whitening_matrix=self.matrix, unwhitening_matrix=self.inverse)

    def unfold(self, weights: dict[str, Tensor]) -> None:
        """Substitute `x = z M^-1 + mean` in the weights."""
        if "W_enc" not in weights:
            raise InputError("covariance_whitening: a decoder that is its own encoder cannot be whitened")
        weights["W_enc"].copy_(self.inverse @ weights["W_enc"].double())
        weights["W_dec"].copy_(weights["W_dec"].double() @ self.matrix)
        weights["b_dec"].copy_((weights["b_dec"].double() - self.mean) @ self.matrix)


def make_normalizer(name: str, d_in: int) -> Normalizer:
    """A new normaliser by SAELens's name for it."""
    match name:
        case "none":
            return Identity()
        case "layer_norm":
            return LayerNorm()
        case "constant_norm_rescale":
            return ConstantNorm()
        case "expected_average_only_in":
            return ExpectedAverage()
        case "covariance_whitening":
            return Whitening(d_in)
        case _:
            raise InputError(f"normalize_activations: SAELens knows no normaliser {name!r}")


def name_of(normalizer: Normalizer) -> str:
    """SAELens's name of a normaliser.

    >>> name_of(LayerNorm())
    'layer_norm'
    """
    return next(name for name in NAMES if type(make_normalizer(name, 1)) is type(normalizer))

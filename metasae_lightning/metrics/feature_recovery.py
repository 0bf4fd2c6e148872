"""Torchmetric of how well an SAE recovers known features."""

from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional
from metasae_lightning.errors import InputError
from metasae_lightning.step import Codes

# A row contains a foreign feature from this cosine on.
FOREIGN_COSINE = 0.2


class FeatureRecovery(Metric):
    """How well an SAE recovers known features: decoder rows against directions, latents against firings.

    All results lie between 0 and 1. `mcc` is the mean absolute cosine under the best one-to-one match. `uniqueness` is the number of
    features that are nearest to some row, divided by the number of rows. With firings, each latent is a detector of the feature nearest to
    its row: `precision`, `recall` and `f1` are means over latents. `absorbed` is a mean over features: how often, when the feature is
    present, its own latent (with the nearest row) is silent while a latent of another feature fires whose row contains this feature
    beyond what the two features share.

    >>> metric = FeatureRecovery(torch.eye(2))
    >>> decoder, fired = torch.tensor([[0.0, -1.0], [2.0, 0.0], [3.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    >>> metric.update(decoder, Codes.from_dense(fired), Codes.from_dense(torch.tensor([[1.0, 0.0], [0.0, 1.0]])))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'mcc': 1.0, 'uniqueness': 0.667, 'precision': 0.833, 'recall': 1.0, 'f1': 0.889, 'absorbed': 0.0}
    """

    full_state_update = False
    features: Tensor
    decoder: Tensor
    nearest: Tensor
    both: Tensor
    fired: Tensor
    true: Tensor
    absorbed: Tensor
    own: Tensor
    foreign: Tensor
    tokens: Tensor

    def __init__(self, features: Float[Tensor, "feature d_in"], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("features", functional.unit_rows(features.detach().float()))
        # Every rank has the same decoder: buffers, not states, which would be synchronised.
        self.register_buffer("decoder", torch.zeros(0, features.shape[1]), persistent=False)
        self.register_buffer("nearest", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("own", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("foreign", torch.zeros(0, len(features)), persistent=False)
        for name, size in (("both", (0,)), ("fired", (0,)), ("true", (len(features),)), ("absorbed", (len(features),)), ("tokens", ())):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, W_dec: Float[Tensor, "d_sae d_in"], codes: Codes | None = None, features: Codes | None = None) -> None:
        """Set the decoder and add a batch: the codes, and the true `features` on the same tokens.

        A new decoder resets the counts. Without codes or features, only the decoder is set.
        """
        if not torch.equal(W_dec, self.decoder):
            self.decoder = W_dec.detach().clone()
            cosines = self._cosines()
            self.nearest, self.own, self.foreign = cosines.argmax(1), cosines.argmax(0), self._foreign_features(cosines.argmax(1))
            self.both, self.fired = torch.zeros_like(self.nearest), torch.zeros_like(self.nearest)
            self.true, self.absorbed, self.tokens = (torch.zeros_like(count) for count in (self.true, self.absorbed, self.tokens))
        if codes is None or features is None:
            return
        if codes.shape[0] != features.shape[0]:
            raise InputError(
                f"FeatureRecovery: codes and features must be of the same tokens, got {codes.shape[0]} and {features.shape[0]}"
            )
        width = features.shape[1]
        hits = torch.isin(codes.rows * width + self.nearest[codes.latents], features.rows * width + features.latents)
        self.both += torch.bincount(codes.latents[hits], minlength=codes.shape[1])
        self.fired += codes.firings()
        self.true += features.firings()
        self.absorbed += torch.bincount(features.latents[self._absorbed_firings(codes, features)], minlength=width)
        self.tokens += codes.shape[0]

    def reset(self) -> None:
        """Reset the counts and the decoder."""
        super().reset()
        self.decoder = self.decoder[:0]

    def _foreign_features(self, nearest: Tensor) -> Tensor:
        """For each decoder row and feature: 1 where the row contains that feature and it is not the row's nearest, else 0.

        `nearest` has the index of each row's nearest feature, `n`. A row contains feature `f` if `cos(row, f)` is at least `cos(n, f) +
        FOREIGN_COSINE`. A row that points away from `n` is turned around first.
        """
        signed = functional.unit_rows(self.decoder.float()) @ self.features.T
        signed = signed * signed.gather(1, nearest[:, None]).sign()
        beyond = signed - (self.features @ self.features.T)[nearest]
        return (beyond >= FOREIGN_COSINE).scatter(1, nearest[:, None], False).float()

    def _absorbed_firings(self, codes: Codes, features: Codes) -> Tensor:
        """Mask of the true firings that a latent of another feature has absorbed."""
        silent = ~torch.isin(features.rows * codes.shape[1] + self.own[features.latents], codes.rows * codes.shape[1] + codes.latents)
        fired = torch.zeros(codes.shape, device=codes.latents.device)
        fired[codes.rows, codes.latents] = 1.0
        return silent & ((fired @ self.foreign)[features.rows, features.latents] > 0)

    def _cosines(self) -> Tensor:
        return (functional.unit_rows(self.decoder.float()) @ self.features.T).abs()

    def compute(self) -> dict[str, Tensor]:
        """`mcc` and `uniqueness`; after updates with codes and features, also `precision`, `recall`, `f1` and `absorbed`."""
        cosines = self._cosines()
        assignment = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
        rows, columns = (torch.as_tensor(index, device=cosines.device) for index in assignment)
        tracked = torch.tensor(len(self.nearest.unique()), device=cosines.device)
        figures = {"mcc": cosines[rows, columns].mean(), "uniqueness": tracked / len(self.nearest)}
        if self.tokens:
            scores = functional.detection(self.both.double(), self.fired.double(), self.true[self.nearest].double())
            figures |= {name: score.mean() for name, score in zip(("precision", "recall", "f1"), scores, strict=True)}
            figures["absorbed"] = (self.absorbed / self.true)[self.true > 0].double().mean()
        return figures

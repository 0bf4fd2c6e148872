"""Torchmetrics: state only, right under several ranks; the formulas are in `functional`."""

from typing import Any

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric

from metasae_lightning import functional
from metasae_lightning.cofiring import Phi, PhiSample
from metasae_lightning.critic import Decomposition
from metasae_lightning.errors import InputError
from metasae_lightning.splice import Splice
from metasae_lightning.step import Codes

__all__ = ["DeadLatents", "DecoderGeometry", "Decomposition", "FeatureRecovery", "Phi", "PhiSample", "Reconstruction", "Splice"]


# Norms are sorted into sixteenths of an octave, from 2^-20 to 2^40.
OCTAVES, PARTS = (-20, 40), 16
# Of a cosine: from here on a row is said to hold another's feature.
FOREIGN = 0.2


class Reconstruction(Metric):
    """How well activations are rebuilt, from global sums, not from a mean of batch ratios.

    `fvu`, `cosine`, `l2_ratio` (mean of ||xhat|| / ||x||), `gamma` (relative reconstruction bias, the factor by which reconstructions
    should be divided: below 1 they are too short), `l0`, `l1`, and `error_q1` to `error_q4`, the squared error of tokens in each
    quarter by norm as a share of their squared norm.

    >>> metric = Reconstruction(d_in=1)
    >>> x = torch.tensor([[0.0], [2.0]])
    >>> metric.update(x, torch.ones(2, 1), Codes.from_dense(torch.tensor([[1.0, 1.0], [0.0, 0.0]])))
    >>> {name: metric.compute()[name].item() for name in ("fvu", "l0", "l1", "gamma")}
    {'fvu': 1.0, 'l0': 1.0, 'l1': 1.0, 'gamma': 1.0}
    """

    full_state_update = False
    tokens: Tensor
    total: Tensor
    squares: Tensor
    error: Tensor
    active: Tensor
    size: Tensor
    cosine: Tensor
    ratio: Tensor
    length: Tensor
    along: Tensor
    by_norm: Tensor

    def __init__(self, d_in: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("tokens", "squares", "error", "active", "size", "cosine", "ratio", "length", "along"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        # Of each bin: tokens, squared error, squared norm.
        self.add_state("by_norm", torch.zeros(3, (OCTAVES[1] - OCTAVES[0]) * PARTS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x: Float[Tensor, "batch d_in"], reconstruction: Float[Tensor, "batch d_in"], codes: Codes) -> None:
        """Add a batch."""
        x, reconstruction = x.double(), reconstruction.double()
        for name, value in zip(("tokens", "total", "squares", "error"), functional.reconstruction_sums(x, reconstruction), strict=True):
            setattr(self, name, getattr(self, name) + value)
        for name, value in zip(("cosine", "ratio", "length", "along"), functional.agreement_sums(x, reconstruction), strict=True):
            setattr(self, name, getattr(self, name) + value)
        self.active += codes.values.numel()
        self.size += codes.values.abs().sum()
        squares = x.square().sum(-1)
        place = ((squares.clamp(min=1e-300).log2() / 2 - OCTAVES[0]) * PARTS).long().clamp(0, self.by_norm.shape[1] - 1)
        for row, values in zip(self.by_norm, (torch.ones_like(squares), (x - reconstruction).square().sum(-1), squares), strict=True):
            row.index_add_(0, place, values)

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        figures = {"fvu": functional.fvu_of_sums((self.tokens, self.total, self.squares, self.error))}
        figures |= {"cosine": self.cosine / self.tokens, "l2_ratio": self.ratio / self.tokens, "gamma": self.length / self.along}
        figures |= {"l0": self.active / self.tokens, "l1": self.size / self.tokens}
        # A bin that lies across quarters gives each as much of itself as lies in it.
        tokens, error, squares = self.by_norm
        ends = tokens.cumsum(0)
        for q in range(4):
            within = ends.clamp(max=(q + 1) * self.tokens / 4) - (ends - tokens).clamp(min=q * self.tokens / 4)
            share = within.clamp(min=0) / tokens.clamp(min=1)
            figures[f"error_q{q + 1}"] = (share * error).sum() / (share * squares).sum()
        return figures


class DeadLatents(Metric):
    """How often latents fire: the share that is dead, and the densities of all.

    `dead` is the share that was silent over the last `window` tokens (over everything seen, without one), `below_1e-05` and
    `below_1e-06` the shares that fired on fewer tokens than that.

    >>> metric = DeadLatents(d_sae=4)
    >>> metric.update(Codes.from_dense(torch.tensor([[1.0, 0.0, 2.0, 0.0]])))
    >>> metric.compute()["dead"].item(), metric.density().tolist()
    (0.5, [1.0, 0.0, 1.0, 0.0])
    """

    full_state_update = False
    firings: Tensor
    silent_for: Tensor
    tokens: Tensor

    def __init__(self, d_sae: int, window: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.window = window
        self.add_state("firings", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="sum")
        # Ranks see tokens side by side: a latent is silent since the rank that heard it last, times their number.
        self.add_state("silent_for", torch.zeros(d_sae, dtype=torch.int64), dist_reduce_fx="min")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Codes) -> None:
        """Add a batch."""
        fired = codes.firings()
        self.firings += fired
        self.silent_for = torch.where(fired > 0, 0, self.silent_for + codes.shape[0])
        self.tokens += codes.shape[0]

    def density(self) -> Float[Tensor, " d_sae"]:
        """On what share of the tokens each latent fired."""
        return self.firings.double() / self.tokens

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        silent = self.firings == 0
        if self.window is not None:
            ranks = torch.distributed.get_world_size() if self._is_synced else 1
            silent = self.silent_for * ranks >= self.window
        shares = {f"below_{share:g}": (self.density() < share).double().mean() for share in (1e-5, 1e-6)}
        return {"dead": silent.double().mean(), **shares}


class DecoderGeometry(Metric):
    """How decoder rows lie to each other: the mean and the largest of each row's cosine with its nearest other row; their lengths.

    >>> metric = DecoderGeometry()
    >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    >>> {name: round(value.item(), 3) for name, value in metric.compute().items()}
    {'nearest_mean': 0.733, 'nearest_max': 0.8, 'norm_mean': 2.667, 'norm_min': 1.0, 'norm_max': 5.0}
    """

    full_state_update = False
    nearest: list[Tensor]
    norms: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        # Every rank holds the same decoder: its own is the answer.
        super().__init__(**{"sync_on_compute": False, **kwargs})
        for name in ("nearest", "norms"):
            self.add_state(name, [], dist_reduce_fx=None)

    def update(self, W_dec: Float[Tensor, "d_sae d_in"]) -> None:
        """Take a decoder; the last one counts."""
        self.nearest = [functional.nearest_cosines(W_dec.detach().float())]
        self.norms = [W_dec.detach().float().norm(dim=-1)]

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        nearest, norms = self.nearest[0].double(), self.norms[0].double()
        figures = {"nearest_mean": nearest.mean(), "nearest_max": nearest.max()}
        return figures | {"norm_mean": norms.mean(), "norm_min": norms.min(), "norm_max": norms.max()}


class FeatureRecovery(Metric):
    """How well an SAE recovers known features: its decoder their directions, its latents their firings.

    `mcc` is the mean absolute cosine under the best one-to-one match, `uniqueness` the number of features that are some row's nearest,
    over the number of rows. Where firings were seen, each latent is a detector of the feature nearest to its row: `precision`, `recall`
    and `f1` are means over latents. `absorbed` is the mean over features of how often, when a feature is there, its own latent (whose
    row is nearest) is silent while one of another feature fires whose row holds some of this one beyond what the two features share.

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
        # Every rank holds the same decoder: no state, which ranks would put together.
        self.register_buffer("decoder", torch.zeros(0, features.shape[1]), persistent=False)
        self.register_buffer("nearest", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("own", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("foreign", torch.zeros(0, len(features)), persistent=False)
        for name, size in (("both", (0,)), ("fired", (0,)), ("true", (len(features),)), ("absorbed", (len(features),)), ("tokens", ())):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, W_dec: Float[Tensor, "d_sae d_in"], codes: Codes | None = None, features: Codes | None = None) -> None:
        """Take a decoder, and a batch's codes with the true firings; what was counted with another decoder is forgotten."""
        if not torch.equal(W_dec, self.decoder):
            self.decoder = W_dec.detach().clone()
            cosines = self._cosines()
            self.nearest, self.own, self.foreign = cosines.argmax(1), cosines.argmax(0), self._foreign(cosines.argmax(1))
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
        self.absorbed += torch.bincount(features.latents[self._taken_in(codes, features)], minlength=width)
        self.tokens += codes.shape[0]

    def reset(self) -> None:
        """Forget the decoder too: its counts are gone."""
        super().reset()
        self.decoder = self.decoder[:0]

    def _foreign(self, nearest: Tensor) -> Tensor:
        """Ones where a row holds a feature that is not its own, beyond what its own has in common with that."""
        signed = functional.unit_rows(self.decoder.float()) @ self.features.T
        signed = signed * signed.gather(1, nearest[:, None]).sign()
        beyond = signed - (self.features @ self.features.T)[nearest]
        return (beyond >= FOREIGN).scatter(1, nearest[:, None], False).float()

    def _taken_in(self, codes: Codes, features: Codes) -> Tensor:
        """Of the true firings those that another feature's latent has taken in."""
        silent = ~torch.isin(features.rows * codes.shape[1] + self.own[features.latents], codes.rows * codes.shape[1] + codes.latents)
        fired = torch.zeros(codes.shape, device=codes.latents.device)
        fired[codes.rows, codes.latents] = 1.0
        return silent & ((fired @ self.foreign)[features.rows, features.latents] > 0)

    def _cosines(self) -> Tensor:
        return (functional.unit_rows(self.decoder.float()) @ self.features.T).abs()

    def compute(self) -> dict[str, Tensor]:
        """See the class."""
        cosines = self._cosines()
        matched = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
        rows, columns = (torch.as_tensor(index, device=cosines.device) for index in matched)
        tracked = torch.tensor(len(self.nearest.unique()), device=cosines.device)
        figures = {"mcc": cosines[rows, columns].mean(), "uniqueness": tracked / len(self.nearest)}
        if self.tokens:
            scores = functional.detection(self.both.double(), self.fired.double(), self.true[self.nearest].double())
            figures |= {name: score.mean() for name, score in zip(("precision", "recall", "f1"), scores, strict=True)}
            figures["absorbed"] = (self.absorbed / self.true)[self.true > 0].double().mean()
        return figures

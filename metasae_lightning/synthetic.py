"""Planted data: activations whose true features are known."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch, Codes

__all__ = ["SyntheticModelConfig", "SyntheticStream", "plant"]


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def plant(config: SyntheticModelConfig, *, shared_subspaces: int = 0, sharing: float = 0.5, seed: int = 0) -> SyntheticModel:
    """SAELens's synthetic model, with features that overlap by construction where `shared_subspaces = s > 0`.

    Then the direction of feature j is `f_j = unit(own_j + sharing * common_a(j))` with `own_j` as SAELens made it and
    `common_1 .. common_s` random unit directions dealt evenly to the features: the ground truth of what a decomposability penalty
    should see through. For independent directions in many dimensions, features of one subspace have cosine
    `sharing^2 / (1 + sharing^2)`. `seed` is the model's where its config has none.
    """
    if shared_subspaces < 0:
        raise InputError(f"shared_subspaces must be 0 or more, got {shared_subspaces}")
    # Without a seed SAELens draws the model from the global random state.
    config = config if config.seed is not None else replace(config, seed=seed)
    # It orthogonalises by gradient descent, wherever it is called from.
    with torch.inference_mode(False), torch.enable_grad():
        model = SyntheticModel(config).requires_grad_(False)
    if shared_subspaces:
        vectors = model.feature_dict.feature_vectors
        vectors.copy_(_sharing(vectors, shared_subspaces, sharing, _seed("subspaces", config.seed)))
    return model


class SyntheticStream:
    """Batches of a planted model; batch `i` is a function of `(seed, split, rank, i)`, so the whole state is an index.

    Held-out batches come with the firings of the features that made them. Training has no use for them, and sorting them out takes up
    to half as long again as drawing them.
    """

    def __init__(self, model: SyntheticModel, *, split: str = "train", tokens: int, batch_size: int, seed: int = 0, rank: int = 0):
        if batch_size < 1 or tokens < batch_size:
            raise InputError(f"tokens must fill a batch, and a batch holds at least 1: got tokens={tokens}, batch_size={batch_size}")
        self.model = model
        self.split = split
        self.tokens = tokens
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self._given = 0

    @property
    def features(self) -> Float[Tensor, "feature d_in"]:
        """The true directions, of unit norm."""
        return self.model.feature_dict.feature_vectors.detach()

    def __len__(self) -> int:
        """How many whole batches the budget holds."""
        return self.tokens // self.batch_size

    def batch(self, index: int) -> Batch:
        """Batch number `index`, whichever came before."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self.seed, self.split, self.rank, index))
            activations, firings = self.model.sample_with_features(self.batch_size)
        return Batch(activations.float(), features=None if self.split == "train" else Codes.from_dense(firings))

    def __iter__(self) -> Iterator[Batch]:
        if self.split != "train" or self._given >= len(self):
            self._given = 0
        while self._given < len(self):
            self._given += 1
            yield self.batch(self._given - 1)
        self._given = 0

    def state_dict(self) -> dict[str, Any]:
        """How many batches were handed out."""
        return {"batches": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another such stream stood."""
        self._given = int(state["batches"])


def _sharing(own: Float[Tensor, "feature d_in"], subspaces: int, sharing: float, seed: int) -> Float[Tensor, "feature d_in"]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.nn.functional.normalize(torch.randn(subspaces, own.shape[1], generator=generator), dim=-1)
    # Dealt in a random order but evenly, so that no direction stays without a second feature.
    dealt = torch.randperm(len(own), generator=generator) % subspaces
    return torch.nn.functional.normalize(own + sharing * common[dealt].to(own), dim=-1)

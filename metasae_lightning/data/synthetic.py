"""Activations of SAELens's synthetic model, whose true features are known: the stream and its DataModule."""

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from lightning import LightningDataModule
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig
from torch import Tensor

from metasae_lightning.corpora.base import Split
from metasae_lightning.errors import InputError
from metasae_lightning.step import Batch, Codes


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def plant(config: SyntheticModelConfig, *, shared_subspaces: int = 0, sharing: float = 0.5, seed: int = 0) -> SyntheticModel:
    """SAELens's synthetic model, with features that overlap by construction where `shared_subspaces = s > 0`.

    The direction of feature j is then `f_j = unit(own_j + sharing * common_a(j))` with `own_j` as SAELens made it and
    `common_1 .. common_s` random unit directions dealt evenly to the features: the ground truth of what a decomposability penalty
    should see through. For independent directions in many dimensions, features of one subspace have cosine
    `sharing^2 / (1 + sharing^2)`. `seed` is the model's where its config has none.
    """
    if shared_subspaces < 0:
        raise InputError(f"shared_subspaces must be 0 or more, got {shared_subspaces}")
    # Without a seed SAELens uses the global random state.
    config = config if config.seed is not None else replace(config, seed=seed)
    # SAELens orthogonalises by gradient descent, also under no_grad.
    with torch.inference_mode(False), torch.enable_grad():
        model = SyntheticModel(config).requires_grad_(False)
    if shared_subspaces:
        vectors = model.feature_dict.feature_vectors
        vectors.copy_(_sharing(vectors, shared_subspaces, sharing, _seed("subspaces", config.seed)))
    return model


class SyntheticStream:
    """Batches of a synthetic model; batch `i` depends on `(seed, split, rank, i)` alone, so the state is an index.

    Held-out batches include the firings of the true features. Training batches do not, since extracting firings costs up to half as
    much as drawing the batch.
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
        """Unit directions of the true features."""
        return self.model.feature_dict.feature_vectors.detach()

    def __len__(self) -> int:
        """Number of whole batches in the budget."""
        return self.tokens // self.batch_size

    def batch(self, index: int) -> Batch:
        """Batch `index`."""
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
        """Number of batches that were used."""
        return {"batches": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved index."""
        self._given = int(state["batches"])


def _sharing(own: Float[Tensor, "feature d_in"], subspaces: int, sharing: float, seed: int) -> Float[Tensor, "feature d_in"]:
    generator = torch.Generator().manual_seed(seed)
    common = torch.nn.functional.normalize(torch.randn(subspaces, own.shape[1], generator=generator), dim=-1)
    # Assigned evenly in random order, so that every direction has at least two features.
    dealt = torch.randperm(len(own), generator=generator) % subspaces
    return torch.nn.functional.normalize(own + sharing * common[dealt].to(own), dim=-1)


class SyntheticDataModule(LightningDataModule):
    """Activations of SAELens's synthetic model, whose true features are known.

    ```yaml
    data:
      class_path: metasae_lightning.SyntheticDataModule
      init_args:
        model:
          num_features: 512
          hidden_dim: 64
          firing_probability: {class_path: sae_lens.synthetic.ConstantFiringProbabilityConfig, init_args: {probability: 0.02}}
          std_firing_magnitudes: {class_path: sae_lens.synthetic.LinearMagnitudeConfig, init_args: {start: 0.1, end: 0.5}}
          orthogonalization: {num_steps: 100}
        tokens: 1_000_000
        shared_subspaces: 32
    ```

    Args:
        model: SAELens's config of the planted model.
        tokens: Budget of training tokens, over all ranks.
        batch_size: Tokens of a batch, on each rank.
        validation_tokens: Tokens of a validation, over all ranks.
        test_tokens: Tokens of a test, over all ranks.
        shared_subspaces: Number of common directions, each shared by several features; 0 keeps SAELens's features.
        sharing: Length of the common direction beside a feature's own unit direction.
        seed: Seed of the batches, and of the model where its config has none.
    """

    def __init__(
        self,
        model: SyntheticModelConfig,
        *,
        tokens: int,
        batch_size: int = 4096,
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        shared_subspaces: int = 0,
        sharing: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        self.model = model
        self.tokens = tokens
        self.batch_size = batch_size
        self.validation_tokens = validation_tokens
        self.test_tokens = test_tokens
        self.shared_subspaces = shared_subspaces
        self.sharing = sharing
        self.seed = seed
        self._planted = plant(model, shared_subspaces=shared_subspaces, sharing=sharing, seed=seed)
        self._train = self.stream("train", tokens)

    def stream(self, split: Split, tokens: int) -> SyntheticStream:
        """A new stream of this rank's share of a split's tokens."""
        rank, world_size = rank_and_world_size(self)
        return SyntheticStream(
            self._planted, split=split, tokens=tokens // world_size, batch_size=self.batch_size, seed=self.seed, rank=rank
        )

    def train_dataloader(self) -> SyntheticStream:
        state = self._train.state_dict()
        self._train = self.stream("train", self.tokens)
        self._train.load_state_dict(state)
        return self._train

    def val_dataloader(self) -> SyntheticStream:
        return self.stream("validation", self.validation_tokens)

    def test_dataloader(self) -> SyntheticStream:
        return self.stream("test", self.test_tokens)

    @property
    def widths(self) -> dict[str, int]:
        """Width of the activations, by hook."""
        return {"synthetic": self.d_in}

    @property
    def d_in(self) -> int:
        """Width of the activations."""
        return self.model.hidden_dim

    @property
    def features(self) -> Tensor | None:
        """Directions of the true features, one row each."""
        return self._planted.feature_dict.feature_vectors

    def metadata(self, hook: str | None = None) -> dict[str, Any]:
        """Metadata about the data for an exported SAE, by SAELens's names."""
        planted = f"sae_lens synthetic model of {self.model.num_features} features"
        return {"model_name": planted, "dataset_path": planted, "hook_name": "synthetic"}

    def state_dict(self) -> dict[str, Any]:
        return self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train.load_state_dict(state_dict)


def rank_and_world_size(module: LightningDataModule) -> tuple[int, int]:
    """Rank and number of ranks of the trainer; (0, 1) without a trainer.

    The trainer decides, not torch's process group: without a trainer a data module gives every process all of the data.
    """
    trainer = module.trainer
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

"""Activations of SAELens's synthetic model, whose true features are known: the stream and the Lightning data module."""

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
    """A random seed that depends on these values alone."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest(), "big")


def plant(config: SyntheticModelConfig, *, shared_subspaces: int = 0, sharing: float = 0.5, seed: int = 0) -> SyntheticModel:
    """SAELens's synthetic model, with features that overlap by construction where `shared_subspaces = s > 0`.

    The direction of feature j is then `f_j = unit(own_j + sharing * common_a(j))`. `own_j` is SAELens's direction. `common_1 .. common_s`
    are random unit directions, and `common_a(j)` is the one assigned to feature j. Each is assigned to equally many features, or to one
    more. These common parts are what a decomposability penalty should find. For independent directions in many dimensions, two features
    with the same common direction have cosine `sharing^2 / (1 + sharing^2)`. `seed` is the model's seed where its config has none.
    """
    for name, value in (("shared_subspaces", shared_subspaces), ("sharing", sharing)):
        if not 0 <= value < float("inf"):
            raise InputError(f"{name} must be 0 or more, got {value}")
    # Without a seed SAELens uses the global random state.
    config = config if config.seed is not None else replace(config, seed=seed)
    # SAELens orthogonalises by gradient descent, and this function may be called without gradients.
    with torch.inference_mode(False), torch.enable_grad():
        model = SyntheticModel(config).requires_grad_(False)
    # SAELens takes a negative one, and draws as with its absolute value.
    if (least := model.activation_generator.std_firing_magnitudes.min().item()) < 0:
        raise InputError(f"model.std_firing_magnitudes must be 0 or more, got {least:g}")
    if shared_subspaces:
        vectors = model.feature_dict.feature_vectors
        vectors.copy_(_add_common_directions(vectors, shared_subspaces, sharing, _seed("subspaces", config.seed)))
    return model


class SyntheticStream:
    """Batches of a synthetic model. Batch `i` depends on `(seed, split, rank, i)` alone, so the state is one number.

    Held-out batches also contain the activations of the true features. Training batches do not: no one reads them there, and to make them
    sparse takes up to half the time of a batch.
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
        self._n_received = 0

    @property
    def features(self) -> Float[Tensor, "feature d_in"]:
        """The directions of the true features, of unit norm."""
        return self.model.feature_dict.feature_vectors.detach()

    def __len__(self) -> int:
        """Number of whole batches in the budget of tokens."""
        return self.tokens // self.batch_size

    def batch(self, index: int) -> Batch:
        """Batch number `index`; it does not depend on the batches before it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(self.seed, self.split, self.rank, index))
            activations, firings = self.model.sample_with_features(self.batch_size)
        return Batch(activations.float(), features=None if self.split == "train" else Codes.from_dense(firings))

    def __iter__(self) -> Iterator[Batch]:
        if self.split != "train" or self._n_received >= len(self):
            self._n_received = 0
        while self._n_received < len(self):
            self._n_received += 1
            yield self.batch(self._n_received - 1)
        self._n_received = 0

    def state_dict(self) -> dict[str, Any]:
        """The number of batches that the caller has received."""
        return {"batches": self._n_received}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that another stream gave."""
        self._n_received = int(state["batches"])


def _add_common_directions(own: Float[Tensor, "feature d_in"], subspaces: int, sharing: float, seed: int) -> Float[Tensor, "feature d_in"]:
    """The directions `unit(own_j + sharing * common_a(j))` for `subspaces` random common directions."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.nn.functional.normalize(torch.randn(subspaces, own.shape[1], generator=generator), dim=-1)
    # In random order but in equal numbers, so that each common direction has at least two features where the numbers allow it.
    assigned = torch.randperm(len(own), generator=generator) % subspaces
    return torch.nn.functional.normalize(own + sharing * common[assigned].to(own), dim=-1)


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
        model: SAELens's config of the synthetic model.
        tokens: Number of training tokens, over all ranks.
        batch_size: Tokens in a batch, on each rank.
        validation_tokens: Tokens in a validation, over all ranks.
        test_tokens: Tokens in a test, over all ranks.
        shared_subspaces: Number of common directions that the features share; 0 leaves the features as SAELens makes them.
        sharing: Length of the common direction that is added to a feature's own unit direction: 0 or more.
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
        self._model = plant(model, shared_subspaces=shared_subspaces, sharing=sharing, seed=seed)
        self._train_stream = self.stream("train", tokens)

    def stream(self, split: Split, tokens: int) -> SyntheticStream:
        """A new stream of this rank's part of `tokens` tokens of a split."""
        rank, world_size = rank_and_world_size(self)
        return SyntheticStream(self._model, split=split, tokens=tokens // world_size, batch_size=self.batch_size, seed=self.seed, rank=rank)

    def train_dataloader(self) -> SyntheticStream:
        """This rank's training batches, from the position of the checkpoint on where a run is resumed."""
        state = self._train_stream.state_dict()
        self._train_stream = self.stream("train", self.tokens)
        self._train_stream.load_state_dict(state)
        return self._train_stream

    def val_dataloader(self) -> SyntheticStream:
        """Batches of the validation split."""
        return self.stream("validation", self.validation_tokens)

    def test_dataloader(self) -> SyntheticStream:
        """Batches of the test split."""
        return self.stream("test", self.test_tokens)

    @property
    def widths(self) -> dict[str, int]:
        """The width of the activations, under the hook name `synthetic`."""
        return {"synthetic": self.d_in}

    @property
    def d_in(self) -> int:
        """The width of the activations."""
        return self.model.hidden_dim

    @property
    def features(self) -> Tensor | None:
        """The directions of the true features, one in each row."""
        return self._model.feature_dict.feature_vectors

    def metadata(self, hook: str | None = None) -> dict[str, Any]:
        """Metadata for a published SAE: the model and the data, under SAELens's names."""
        name = f"sae_lens synthetic model of {self.model.num_features} features"
        return {"model_name": name, "dataset_path": name, "hook_name": "synthetic"}

    def state_dict(self) -> dict[str, Any]:
        """The number of training batches that the training loop has received, which is the same on all ranks."""
        return self._train_stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the training batches that the saved run received."""
        self._train_stream.load_state_dict(state_dict)


def rank_and_world_size(module: LightningDataModule) -> tuple[int, int]:
    """Rank and number of ranks of the trainer; (0, 1) without a trainer.

    The trainer decides, not torch's process group: without a trainer a data module gives every process all of the data.
    """
    trainer = module.trainer
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

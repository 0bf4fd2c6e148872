"""Lightning's view of planted data: its three splits, its width, its state."""

from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from metasae_lightning.corpora import Split
from metasae_lightning.synthetic import SyntheticModelConfig, SyntheticStream, plant


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
        shared_subspaces: How many common directions are dealt to the features; 0 leaves the features as SAELens makes them.
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
        """A fresh stream of this rank's share of so many tokens of a split."""
        rank, world_size = place_of(self)
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
        """The one width."""
        return {"synthetic": self.d_in}

    @property
    def d_in(self) -> int:
        """The activations' width."""
        return self.model.hidden_dim

    @property
    def features(self) -> Tensor | None:
        """The true directions, a row each."""
        return self._planted.feature_dict.feature_vectors

    def metadata(self, hook: str | None = None) -> dict[str, Any]:
        """What a published SAE tells of its data, by SAELens's names."""
        planted = f"sae_lens synthetic model of {self.model.num_features} features"
        return {"model_name": planted, "dataset_path": planted, "hook_name": "synthetic"}

    def state_dict(self) -> dict[str, Any]:
        return self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train.load_state_dict(state_dict)


def place_of(module: LightningDataModule) -> tuple[int, int]:
    """This process's rank and how many there are."""
    trainer = module.trainer
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

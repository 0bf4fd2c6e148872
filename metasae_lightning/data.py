"""Lightning's view of a stream: its three splits, its width, its state."""

from typing import Any

from lightning import LightningDataModule
from torch import Tensor

from metasae_lightning.corpora import Corpus, Split
from metasae_lightning.lm import LanguageModel
from metasae_lightning.stream import ActivationStream
from metasae_lightning.synthetic import SyntheticModelConfig, SyntheticStream, plant


class ActivationsDataModule(LightningDataModule):
    """Activations of a language model on a corpus.

    ```yaml
    data:
      class_path: metasae_lightning.ActivationsDataModule
      init_args:
        language_model:
          class_path: metasae_lightning.lm.HuggingFaceLM
          init_args: {name: smollm2-135m-instruct, hook: blocks.15.hook_resid_post}
        corpus: {class_path: metasae_lightning.corpora.PythonDocs}
        tokens: 200_000
    ```

    Args:
        language_model: The model and its hook.
        corpus: The text.
        tokens: Budget of training tokens, over all ranks.
        batch_size: Tokens of a batch, on each rank.
        context_size: Tokens that the model sees at once, BOS included.
        buffer_size: Tokens that are shuffled among each other.
        held_out: Share of the documents that is validation, and as much again that is test.
        validation_tokens: Tokens of a validation, over all ranks.
        test_tokens: Tokens of a test, over all ranks.
        prepend_bos: Whether each context begins with BOS.
        skip_positions: How many positions at the start of each context, BOS included, are not trained on. Attention sinks sit there:
            a few tokens of a hundred times the median norm that would make up most of the variance.
        max_norm_ratio: Rows whose norm exceeds so many times their batch's median are left out of it, wherever they sit; none keeps all.
        forward_batch: Contexts of a forward pass of the model.
        seed: Seed of the order of documents and of the shuffle.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        corpus: Corpus,
        *,
        tokens: int,
        batch_size: int = 4096,
        context_size: int = 128,
        buffer_size: int = 65536,
        held_out: float = 0.02,
        validation_tokens: int = 65536,
        test_tokens: int = 65536,
        prepend_bos: bool = True,
        skip_positions: int = 0,
        max_norm_ratio: float | None = None,
        forward_batch: int = 32,
        seed: int = 0,
    ):
        super().__init__()
        self.language_model = language_model
        self.corpus = corpus
        self.tokens = tokens
        self.batch_size = batch_size
        self.context_size = context_size
        self.buffer_size = buffer_size
        self.held_out = held_out
        self.validation_tokens = validation_tokens
        self.test_tokens = test_tokens
        self.prepend_bos = prepend_bos
        self.skip_positions = skip_positions
        self.max_norm_ratio = max_norm_ratio
        self.forward_batch = forward_batch
        self.seed = seed
        self._restored: dict[str, Any] | None = None
        self._train: ActivationStream | None = None
        # A wrong number is said before a model is loaded.
        self.stream("train", tokens)

    def setup(self, stage: str | None = None) -> None:
        self.language_model.load()

    def stream(self, split: Split, tokens: int) -> ActivationStream:
        """A fresh stream of this rank's share of so many tokens of a split."""
        rank, world_size = _place(self)
        return ActivationStream(
            self.corpus,
            self.language_model,
            split=split,
            tokens=tokens // world_size,
            batch_size=self.batch_size,
            context_size=self.context_size,
            # Order matters to training only: elsewhere a larger buffer would be memory for nothing.
            buffer_size=self.buffer_size if split == "train" else self.batch_size,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            held_out=self.held_out,
            prepend_bos=self.prepend_bos,
            skip_positions=self.skip_positions,
            max_norm_ratio=self.max_norm_ratio,
            forward_batch=self.forward_batch,
        )

    def train_dataloader(self) -> ActivationStream:
        self._train = self.stream("train", self.tokens)
        if self._restored is not None:
            self._train.load_state_dict(self._restored)
            self._restored = None
        return self._train

    def val_dataloader(self) -> ActivationStream:
        return self.stream("validation", self.validation_tokens)

    def test_dataloader(self) -> ActivationStream:
        return self.stream("test", self.test_tokens)

    @property
    def d_in(self) -> int:
        """The activations' width."""
        self.language_model.load()
        return self.language_model.d_model

    @property
    def features(self) -> Tensor | None:
        """No true features are known."""
        return None

    def metadata(self) -> dict[str, Any]:
        """What a published SAE tells of its data, by SAELens's names."""
        self.language_model.load()
        data: dict[str, Any] = {"dataset_path": self.corpus.identity(), "context_size": self.context_size, "prepend_bos": self.prepend_bos}
        if self.skip_positions:
            data["seqpos_slice"] = [self.skip_positions, None]
        return self.language_model.metadata() | data | {"exclude_special_tokens": True, "sequence_separator_token": "eos"}

    def state_dict(self) -> dict[str, Any]:
        return {} if self._train is None else self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
        if self._train is not None and self._restored is not None:
            self._train.load_state_dict(self._restored)


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
        rank, world_size = _place(self)
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
    def d_in(self) -> int:
        """The activations' width."""
        return self.model.hidden_dim

    @property
    def features(self) -> Tensor | None:
        """The true directions, a row each."""
        return self._planted.feature_dict.feature_vectors

    def metadata(self) -> dict[str, Any]:
        """What a published SAE tells of its data, by SAELens's names."""
        planted = f"sae_lens synthetic model of {self.model.num_features} features"
        return {"model_name": planted, "dataset_path": planted, "hook_name": "synthetic"}

    def state_dict(self) -> dict[str, Any]:
        return self._train.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train.load_state_dict(state_dict)


def _place(module: LightningDataModule) -> tuple[int, int]:
    """This process's rank and how many there are."""
    trainer = module.trainer
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

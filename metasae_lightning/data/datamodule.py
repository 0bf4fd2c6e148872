"""LightningDataModule of a language model's activations."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from metasae_lightning.corpora.base import Corpus, Split, check_held_out
from metasae_lightning.corpora.tokenization import Exhausted, special_ids
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching, Storage
from metasae_lightning.data.cache_folder import CACHED, ActivationCache, fingerprint
from metasae_lightning.data.cached_stream import CachedStream, write
from metasae_lightning.data.stream import Batches, Stream
from metasae_lightning.data.synthetic import rank_and_world_size
from metasae_lightning.errors import InputError
from metasae_lightning.lm import device
from metasae_lightning.lm.base import LanguageModel
from metasae_lightning.step import Batch


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
        buffer_size: Tokens in the shuffle buffer.
        held_out: Share of the documents for validation, and the same share for test.
        validation_tokens: Tokens of a validation, over all ranks.
        test_tokens: Tokens of a test, over all ranks.
        prepend_bos: Whether each context begins with BOS.
        skip_positions: How many positions at the start of each context, BOS included, are not trained on. Attention sinks sit there:
            a few tokens of a hundred times the median norm that would make up most of the variance.
        max_norm_ratio: Rows with a norm above this many times their batch's median are left out; None keeps all.
        forward_batch: Contexts of a forward pass of the model.
        seed: Seed of the order of documents and of the shuffle.
        exhausted: What happens when the documents are exhausted: another `epoch` in another order, or the `end` of the run.
        cross_document_attention: Whether tokens attend to earlier documents of their context. Without it they attend to their own
            and to BOS, if the backend can mask; otherwise a warning is printed and they attend to all.
        buffer_dtype: Data type of the shuffle buffer; batches are float32.
        buffer_device: Device of the buffer: that of the `model`, or `cpu`, in pinned memory if a GPU is used.
        checkpoint_buffer: What checkpoints hold: the position of the buffer's `tokens`, to run them again, or its `activations`.
        prefetch: Batches that a thread makes ahead; by default 2 if the model or the SAE is on a GPU, else 0.
        stall_seconds: Longest wait for a corpus that yields nothing.
        cache: Folder written by `metasae cache` or SAELens's CacheActivationsRunner; activations are read from it without the model.
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
        exhausted: Exhausted = "epoch",
        cross_document_attention: bool = False,
        buffer_dtype: Storage = "float32",
        buffer_device: Literal["model", "cpu"] = "model",
        checkpoint_buffer: Literal["tokens", "activations"] = "tokens",
        prefetch: int | None = None,
        stall_seconds: float = 600.0,
        cache: str | None = None,
    ):
        super().__init__()
        self.language_model = language_model
        self.corpus = corpus
        self.tokens = tokens
        self.validation_tokens = validation_tokens
        self.test_tokens = test_tokens
        self.buffer_device = buffer_device
        self.checkpoint_buffer = checkpoint_buffer
        self.prefetch = prefetch
        self.stall_seconds = stall_seconds
        # Refuse wrong numbers before a model is loaded.
        self.batching = Batching(
            batch_size=batch_size,
            context_size=context_size,
            buffer_size=buffer_size,
            held_out=held_out,
            prepend_bos=prepend_bos,
            skip_positions=skip_positions,
            max_norm_ratio=max_norm_ratio,
            forward_batch=forward_batch,
            seed=seed,
            exhausted=exhausted,
            cross_document_attention=cross_document_attention,
            buffer_dtype=buffer_dtype,
        )
        self.cache = None if cache is None else ActivationCache(cache)
        self.reading_cache = True
        self._told = False
        self._restored: list[dict[str, Any]] = []
        self._train: Stream | None = None
        _check(self.batching, tokens, prefetch, stall_seconds)

    def setup(self, stage: str | None = None) -> None:
        """Load the model up to the hook, or open the cache."""
        if self.cache is not None and self.reading_cache:
            try:
                tokenizer = fingerprint(self.language_model.load_tokenizer())
            except InputError:  # a cache needs no model; ours records the special tokens
                tokenizer = None
            self.cache.open(self.identity(), self.language_model.hooks, tokenizer)
            return
        if (strategy := self._strategy) is not None:
            self.language_model.set_device(device.assign_device(self.language_model.requested_device, strategy))
        self.language_model.load()
        self._warn_once()
        if stage == "fit" and self.batching.held_out:
            ranks, seed = rank_and_world_size(self)[1], self.batching.seed
            check_held_out(self.corpus, self.batching.held_out, seed=seed, ranks=ranks, stall_seconds=self.stall_seconds)

    def _warn_once(self) -> None:
        if self._told:
            return
        self._told, name = True, self.language_model.name
        ends = self.language_model.tokenizer.eos_token_id is not None
        if not (
            self.batching.cross_document_attention or (ends and self.language_model.can_separate_documents(self.batching.context_size))
        ):
            why = "" if ends else ", since its tokenizer has no EOS to end documents with"
            rank_zero_warn(
                f"{name} cannot be kept from attending across the documents of a context{why}: it does "
                "(cross_document_attention: true says that this is meant)"
            )
        if not self.batching.held_out:
            rank_zero_warn("held_out: 0 holds nothing out: no validation, and what is exported is not checked on fresh activations")

    def stream(self, split: Split, tokens: int) -> Stream:
        """A new stream of this rank's share of a split's tokens."""
        rank, world_size = rank_and_world_size(self)
        # Shuffling matters for training only; elsewhere a small buffer saves memory.
        batching = self.batching if split == "train" else replace(self.batching, buffer_size=self.batching.batch_size)
        where: dict[str, Any] = {"split": split, "tokens": tokens // world_size, "rank": rank, "world_size": world_size}
        if self.cache is not None and self.reading_cache:
            return CachedStream(self.cache, batching, special=self._special, prefetch=self.prefetch or 0, **where)
        return ActivationStream(
            self.corpus,
            self.language_model,
            batching,
            prefetch=self.prefetch,
            buffer_device=self.buffer_device,
            checkpoint_buffer=self.checkpoint_buffer,
            stall_seconds=self.stall_seconds,
            home=None if self._strategy is None else self._strategy.root_device,
            **where,
        )

    def train_dataloader(self) -> Iterable[Batch]:
        """This rank's training batches, from the checkpoint's position on."""
        self._train = self.stream("train", self.tokens)
        self._restore()
        return Batches(self._train)

    def val_dataloader(self) -> Iterable[Batch]:
        """Batches of validation documents; none if nothing is held out."""
        return self.stream("validation", self.validation_tokens) if self.batching.held_out else []

    def test_dataloader(self) -> Stream:
        """Batches of test documents."""
        if not self.batching.held_out:
            raise InputError("held_out: 0 leaves no document to test on")
        return self.stream("test", self.test_tokens)

    def teardown(self, stage: str) -> None:
        """Stop the threads that make batches ahead."""
        if self._train is not None:
            self._train.close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the threads after an error or Ctrl-C."""
        self.teardown("fit")

    @property
    def widths(self) -> dict[str, int]:
        """Width of each hook."""
        self.setup()
        return self.cache.widths if self.cache is not None and self.reading_cache else self.language_model.widths

    @property
    def d_in(self) -> int | None:
        """Width of the activations, with a single hook."""
        return next(iter(self.widths.values())) if len(self.widths) == 1 else None

    @property
    def features(self) -> Tensor | None:
        """None: a language model's true features are unknown."""
        return None

    def identity(self) -> dict[str, Any]:
        """What a cache of these activations is a function of: everything but what comes after the model."""
        shape = {name: getattr(self.batching, name) for name in CACHED}
        return {"corpus": self.corpus.description(), **self.corpus.settings(), **self.language_model.description(), **shape}

    def metadata(self, hook: str | None = None) -> dict[str, Any]:
        """Metadata about the data for an exported SAE, by SAELens's names."""
        b, hook = self.batching, hook or self.language_model.hooks[0]
        if self.cache is not None and self.reading_cache:  # the model may not exist here
            named = {"model_name": self.language_model.name, "hook_name": hook, "dataset_path": str(self.cache.path)}
            return self.cache.record["about"][hook] if self.cache.ours else {**named, "context_size": b.context_size}
        self.language_model.load()
        data: dict[str, Any] = {"dataset_path": self.corpus.description(), "context_size": b.context_size, "prepend_bos": b.prepend_bos}
        data |= {"held_out": b.held_out, "max_norm_ratio": b.max_norm_ratio}  # not SAELens's names; used by evaluation
        if b.skip_positions:
            data["seqpos_slice"] = [b.skip_positions, None]
        return self.language_model.metadata(hook) | data | {"exclude_special_tokens": True, "sequence_separator_token": "eos"}

    def write_cache(self, *, shard_gib: float = 1.0, dtype: Literal["float32", "float16"] = "float32") -> None:
        """Run the model over all splits and write its activations to the `cache` folder."""
        if self.cache is None:
            raise InputError("cache: name the folder to write, --data.init_args.cache FOLDER")
        self.reading_cache = False
        self.setup()
        lm = self.language_model
        # A cache holds each document once; epochs are made when reading.
        self.batching = replace(self.batching, exhausted="end")
        streams: dict[Split, Any] = {}
        for split, tokens in (("train", self.tokens), ("validation", self.validation_tokens), ("test", self.test_tokens)):
            if split != "train" and not self.batching.held_out:
                continue
            streams[split] = self.stream(split, tokens)  # pyright: ignore[reportArgumentType]
        about: dict[str, Any] = {hook: self.metadata(hook) for hook in lm.hooks}
        identity = {**self.identity(), "tokenizer": fingerprint(lm.tokenizer)}
        size = self.batching.context_size * lm.d_model * (4 if dtype == "float32" else 2)
        contexts = max(1, int(shard_gib * 2**30) // size)
        about["special"] = special_ids(lm.tokenizer)
        write(self.cache.path, streams, identity, about, shard_contexts=contexts, dtype=dtype)

    @property
    def _strategy(self) -> Any:
        """The trainer's strategy, if there is a trainer."""
        return getattr(self.trainer, "strategy", None)

    @property
    def _special(self) -> list[int]:
        assert self.cache is not None
        return self.cache.record["about"]["special"] if self.cache.ours else special_ids(self.language_model.load_tokenizer())

    def state_dict(self) -> dict[str, Any]:
        """Positions of all ranks: a checkpoint is one file, and ranks read at different speeds."""
        if self._train is None:
            return {}
        own = self._train.state_dict()
        if self._train.world_size == 1 or not torch.distributed.is_initialized():
            return {"ranks": [own]}
        places: list[Any] = [None] * self._train.world_size
        torch.distributed.all_gather_object(places, own)
        return {"ranks": places}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state of the same or of another number of ranks."""
        self._restored = state_dict.get("ranks", [])
        if self._train is not None:
            self._restore()

    def _restore(self) -> None:
        if self._restored and self._train is not None:
            if len(self._restored) == self._train.world_size:
                self._train.load_state_dict(self._restored[self._train.rank])
            else:
                self._train.load_elsewhere(self._restored)
        self._restored = []


def _check(batching: Batching, tokens: int, prefetch: int | None, stall_seconds: float) -> None:
    if tokens < batching.batch_size:
        raise InputError(f"tokens must fill a batch of {batching.batch_size}, got {tokens}")
    if prefetch is not None and prefetch < 0:
        raise InputError(f"prefetch must be at least 0, got {prefetch}")
    if stall_seconds <= 0:
        raise InputError(f"stall_seconds must be more than 0, got {stall_seconds}")

"""The Lightning data module of a language model's activations."""

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
from metasae_lightning.data.batching import Batching, Order, Storage, StreamSlice, cautions, check_numbers
from metasae_lightning.data.cache_folder import CACHED, ActivationCache, fingerprint
from metasae_lightning.data.cached_stream import CachedStream, write
from metasae_lightning.data.context_stream import ContextStream
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
        language_model: The model and its hook or hooks.
        corpus: The text.
        tokens: Number of training tokens, over all ranks.
        batch_size: Tokens in a batch, on each rank.
        context_size: Tokens in a context of the model, BOS included.
        buffer_size: Number of training tokens that are shuffled among each other, on each rank; rounded down to whole batches.
        held_out: Fraction of the documents held out for validation; the same fraction again is held out for the test.
        validation_tokens: Tokens in a validation, over all ranks.
        test_tokens: Tokens in a test, over all ranks.
        prepend_bos: Whether each context begins with BOS, or with EOS if the tokenizer has no BOS.
        skip_positions: Number of positions at the start of each context, BOS included, that every split leaves out: attention
            sinks, a few tokens with a hundred times the median norm, which would be most of the variance.
        max_norm_ratio: Leave out of a batch each row whose norm exceeds the batch's median norm times this number; none keeps all rows.
        forward_batch: Contexts in one forward pass of the model.
        seed: Seed of the order of the documents and of the shuffle.
        exhausted: After the last document of the split, `epoch` reads them again in another order and `end` ends the run.
        cross_document_attention: Whether tokens attend to earlier documents in their context. If not, they attend to their own document
            and to BOS. A backend that cannot mask attention attends to all of the context, with a warning.
        buffer_dtype: Data type of the shuffle buffer; batches are float32.
        buffer_device: Device of the shuffle buffer: that of the `model`, or the `cpu`, in pinned memory where there is a GPU.
        checkpoint_buffer: With `tokens`, a resumed run fills the buffer by running the model on its tokens again. With `activations`,
            checkpoints contain the buffer.
        prefetch: Number of batches that a thread prepares ahead; none is 2 where the model or the SAE is on a GPU. It is 0 with a `cache`,
            or on a CPU, where the thread would compete with training for cores.
        stall_seconds: Longest time to wait for the corpus, in seconds.
        order: `shuffled` makes batches of shuffled rows. `contexts` makes a batch of whole contexts, for an `objective` that runs the model
            on them: `tokens` and `batch_size` then count all tokens of the contexts, and there is no buffer.
        cache: Folder written by `metasae cache` or by SAELens's CacheActivationsRunner. Activations are read from it, and no model is run.
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
        order: Order = "shuffled",
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
        # Wrong numbers are refused before a model is loaded.
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
            order=order,
        )
        self.cache = None if cache is None else ActivationCache(cache)
        self.reading_cache = True
        self._warned = self._text_checked = False
        self._saved_states: list[dict[str, Any]] = []
        self._train_stream: Stream | None = None
        check_numbers(self.batching, tokens, prefetch, stall_seconds, cache)

    def setup(self, stage: str | None = None) -> None:
        """Open the cache, or load the model up to its last hook and, for a fit, refuse a corpus with too few documents."""
        if self.cache is not None and self.reading_cache:
            try:
                tokenizer = fingerprint(self.language_model.load_tokenizer())
            except InputError:  # the model may be absent: our cache records its special tokens
                tokenizer = None
            self.cache.open(self.activations_description(), self.language_model.hooks, tokenizer)
            return
        if stage == "fit":
            self.check_text(rank_and_world_size(self)[1])
        if (strategy := self._strategy) is not None:
            self.language_model.set_device(device.assign_device(self.language_model.requested_device, strategy))
        self.language_model.load()
        for text in () if self._warned else cautions(self.batching, self.language_model):
            rank_zero_warn(text)
        self._warned = True

    def check_text(self, ranks: int) -> None:
        """Refuse, once, text that is missing or has too few documents to train and validate on, before the language model is loaded."""
        if not self._text_checked and not (self.cache is not None and self.reading_cache):
            held_out, seed = self.batching.held_out, self.batching.seed
            check_held_out(self.corpus, held_out, seed=seed, ranks=ranks, stall_seconds=self.stall_seconds)
            self._text_checked = True

    def stream(self, split: Split, tokens: int) -> Stream:
        """A new stream of this rank's part of `tokens` tokens of a split."""
        rank, world_size = rank_and_world_size(self)
        # Only training needs a shuffle, or contexts: in validation and test, a buffer larger than a batch would be a waste of memory.
        changes: dict[str, Any] = {} if split == "train" else {"buffer_size": self.batching.batch_size, "order": "shuffled"}
        batching = replace(self.batching, **changes)
        part = StreamSlice(split, tokens // world_size, rank, world_size, self.prefetch)
        if self.cache is not None and self.reading_cache:
            return CachedStream(self.cache, batching, part, special=self._special)
        home = None if self._strategy is None else self._strategy.root_device
        common: dict[str, Any] = {"stall_seconds": self.stall_seconds, "home": home}
        if batching.order == "contexts":
            return ContextStream(self.corpus, self.language_model, batching, part, **common)
        buffer: dict[str, Any] = {"buffer_device": self.buffer_device, "checkpoint_buffer": self.checkpoint_buffer}
        return ActivationStream(self.corpus, self.language_model, batching, part, **buffer, **common)

    def train_dataloader(self) -> Iterable[Batch]:
        """This rank's training batches, from the position of the checkpoint on where a run is resumed."""
        self._train_stream = self.stream("train", self.tokens)
        self._restore()
        return Batches(self._train_stream)

    def val_dataloader(self) -> Iterable[Batch]:
        """Batches of the validation split, or an empty list where no document is held out."""
        return self.stream("validation", self.validation_tokens) if self.batching.held_out else []

    def test_dataloader(self) -> Stream:
        """Batches of the test split; an InputError where no document is held out."""
        if not self.batching.held_out:
            raise InputError("held_out: 0 leaves no document to test on")
        return self.stream("test", self.test_tokens)

    def teardown(self, stage: str) -> None:
        """Stop the thread that prepares training batches."""
        if self._train_stream is not None:
            self._train_stream.close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop the thread also after an error or Ctrl-C."""
        self.teardown("fit")

    @property
    def widths(self) -> dict[str, int]:
        """The width of the activations at each hook. Loads the language model, or opens the cache."""
        self.setup()
        return self.cache.widths if self.cache is not None and self.reading_cache else self.language_model.widths

    @property
    def d_in(self) -> int | None:
        """The width of the activations where there is one hook, else None. Loads the language model, or opens the cache."""
        return next(iter(self.widths.values())) if len(self.widths) == 1 else None

    @property
    def features(self) -> Tensor | None:
        """None: the true features of a language model are not known."""
        return None

    def activations_description(self) -> dict[str, Any]:
        """All settings that determine the activations in a cache: the corpus, the language model and the contexts."""
        contexts = {name: getattr(self.batching, name) for name in CACHED}
        return {"corpus": self.corpus.description(), **self.corpus.settings(), **self.language_model.description(), **contexts}

    def metadata(self, hook: str | None = None) -> dict[str, Any]:
        """Metadata for a published SAE of a hook, by default the first: model, data and contexts, under SAELens's names if they exist."""
        batching, hook = self.batching, hook or self.language_model.hooks[0]
        if self.cache is not None and self.reading_cache:  # the model may not be on this machine
            metadata = {"model_name": self.language_model.name, "hook_name": hook, "dataset_path": str(self.cache.path)}
            return self.cache.record["about"][hook] if self.cache.ours else {**metadata, "context_size": batching.context_size}
        self.language_model.load()
        data: dict[str, Any] = {
            "dataset_path": self.corpus.description(),
            "context_size": batching.context_size,
            "prepend_bos": batching.prepend_bos,
        }
        data |= {"held_out": batching.held_out, "max_norm_ratio": batching.max_norm_ratio}  # not SAELens's: for `metasae evaluate`
        if batching.skip_positions:
            data["seqpos_slice"] = [batching.skip_positions, None]
        return self.language_model.metadata(hook) | data | {"exclude_special_tokens": True, "sequence_separator_token": "eos"}

    def write_cache(self, *, shard_gib: float = 1.0, dtype: Literal["float32", "float16"] = "float32") -> None:
        """Run the model on every split's tokens and write the activations to `cache`, as `dtype`, in files of about `shard_gib` GiB."""
        if self.cache is None:
            raise InputError("cache: name the folder to write, --data.init_args.cache FOLDER")
        self.reading_cache = False
        self.check_text(1)
        self.setup()
        lm = self.language_model
        # A cache contains each document once: its reader makes the later epochs.
        self.batching = replace(self.batching, exhausted="end")
        streams: dict[Split, Any] = {}
        for split, tokens in (("train", self.tokens), ("validation", self.validation_tokens), ("test", self.test_tokens)):
            if split != "train" and not self.batching.held_out:
                continue
            streams[split] = self.stream(split, tokens)  # pyright: ignore[reportArgumentType]
        metadata: dict[str, Any] = {hook: self.metadata(hook) for hook in lm.hooks}
        description = {**self.activations_description(), "tokenizer": fingerprint(lm.tokenizer)}
        context_bytes = self.batching.context_size * lm.d_model * (4 if dtype == "float32" else 2)
        contexts = max(1, int(shard_gib * 2**30) // context_bytes)
        metadata["special"] = special_ids(lm.tokenizer)
        write(self.cache.path, streams, description, metadata, shard_contexts=contexts, dtype=dtype)

    @property
    def _strategy(self) -> Any:
        """The trainer's strategy, which knows the device of the SAEs, or None without a trainer."""
        return getattr(self.trainer, "strategy", None)

    @property
    def _special(self) -> list[int]:
        """Ids of the special tokens in the cache."""
        assert self.cache is not None
        return self.cache.record["about"]["special"] if self.cache.ours else special_ids(self.language_model.load_tokenizer())

    def state_dict(self) -> dict[str, Any]:
        """All ranks' stream states, gathered: a checkpoint is one file, and ranks read different documents; empty before training."""
        if self._train_stream is None:
            return {}
        state = self._train_stream.state_dict()
        if self._train_stream.part.world_size == 1 or not torch.distributed.is_initialized():
            return {"ranks": [state]}
        states: list[Any] = [None] * self._train_stream.part.world_size
        torch.distributed.all_gather_object(states, state)
        return {"ranks": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the positions of the saved ranks, whose number may differ from that of this run."""
        self._saved_states = state_dict.get("ranks", [])
        if self._train_stream is not None:
            self._restore()

    def _restore(self) -> None:
        """Load the saved states into the training stream, if both exist, and drop the saved states."""
        if self._saved_states and self._train_stream is not None:
            if len(self._saved_states) == self._train_stream.part.world_size:
                self._train_stream.load_state_dict(self._saved_states[self._train_stream.part.rank])
            else:
                self._train_stream.load_other_world_size(self._saved_states)
        self._saved_states = []

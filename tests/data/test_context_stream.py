"""Batches of whole contexts: rows and tokens belong together, and a resumed stream equals one that never stopped."""

from itertools import islice
from typing import Any

import pytest
import torch

from metasae_lightning import ActivationsDataModule
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.context_stream import ContextStream
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, LanguageModel
from metasae_lightning.step import Batch
from tests.helpers.models import Texts, documents, save_model

SIZES: dict[str, Any] = {"batch_size": 48, "context_size": 12, "buffer_size": 48, "held_out": 0.2, "forward_batch": 3, "order": "contexts"}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = save_model(tmp_path_factory.mktemp("contexts") / "tiny", "llama", layers=2)
    model = HuggingFaceLM(str(folder), "blocks.1.hook_resid_post", device="cpu")
    model.load()
    return model


def stream(lm: LanguageModel, *, tokens: int = 480, rank: int = 0, world_size: int = 1, prefetch: int = 0, **changes: Any) -> ContextStream:
    part = StreamSlice("train", tokens, rank, world_size, prefetch)
    return ContextStream(Texts(documents(80)), lm, Batching(**{**SIZES, **changes}), part)


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.contexts is not None and b.contexts is not None
        assert torch.equal(a.activations, b.activations) and torch.equal(a.contexts.tokens, b.contexts.tokens)
        assert torch.equal(a.contexts.positions, b.contexts.positions)


def test_a_batch_has_the_activations_of_its_contexts_trainable_tokens(lm: LanguageModel):
    batches = list(stream(lm, max_norm_ratio=1.2))
    assert len(batches) == 480 // 48
    assert any(batch.contexts.visible is not None for batch in batches if batch.contexts)  # the end of a document lies in some
    dropped = 0
    for batch in batches:
        contexts = batch.contexts
        assert contexts is not None and contexts.tokens.shape == (4, 12)
        expected = lm.activations(contexts.tokens, contexts.visible).flatten(0, 1)[contexts.positions]
        torch.testing.assert_close(batch.activations, expected, rtol=1e-4, atol=1e-5)
        special = torch.isin(contexts.tokens.flatten()[contexts.positions], torch.tensor(lm.tokenizer.all_special_ids))
        assert not special.any()
        dropped += int((~torch.isin(contexts.tokens, torch.tensor(lm.tokenizer.all_special_ids))).sum()) - len(batch)
    assert dropped > 0  # rows of a large norm


def test_contexts_follow_each_other_as_in_the_corpus(lm: LanguageModel):
    shuffled = ActivationStream(
        Texts(documents(80)), lm, Batching(**{**SIZES, "order": "shuffled", "forward_batch": 4}), StreamSlice("train", 480)
    )
    reader = shuffled.row_reader()
    for batch in islice(stream(lm), 4):
        next_pass = reader.next_pass()
        assert batch.contexts is not None and next_pass is not None
        assert torch.equal(batch.contexts.tokens, next_pass[0])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("at", [1, 6])
def test_a_resumed_stream_has_the_remaining_batches(lm: LanguageModel, at: int, prefetch: int):
    expected = list(stream(lm))
    interrupted = stream(lm, prefetch=prefetch)
    iterator = iter(interrupted)
    assert_equal(list(islice(iterator, at)), expected[:at])
    state = interrupted.state_dict()
    iterator.close()  # type: ignore[attr-defined]
    restored = stream(lm, prefetch=prefetch)
    restored.load_state_dict(state)
    assert_equal(list(restored), expected[at:])
    # A larger budget goes on where the smaller one ended.
    finished = stream(lm)
    list(islice(iter(finished), len(finished)))
    longer = stream(lm, tokens=576)
    longer.load_state_dict({**state, "length": 12})
    assert len(list(longer)) == 12 - at


def test_two_ranks_read_different_documents(lm: LanguageModel):
    texts = []
    for rank in range(2):
        batches = list(stream(lm, tokens=240, rank=rank, world_size=2))
        texts.append(" ".join(lm.tokenizer.decode(context) for batch in batches for context in batch.contexts.tokens))  # type: ignore[union-attr]
    numbers = [{word.rstrip(":") for word in text.split("document ") if word[:1].isdigit()} for text in texts]
    first, second = ({number.split(":")[0] for number in found if ":" in number} for found in numbers)
    assert first and second and not first & second


def test_the_end_of_the_corpus_ends_with_the_last_full_batch(lm: LanguageModel):
    ended = stream(lm, tokens=48_000, exhausted="end")
    assert 0 < len(ended) < 1000 and len(list(ended)) == len(ended)


def test_a_checkpoint_of_shuffled_rows_is_refused_and_an_old_one_counts_as_shuffled(lm: LanguageModel):
    shuffled = ActivationStream(Texts(documents(80)), lm, Batching(**{**SIZES, "order": "shuffled"}), StreamSlice("train", 480))
    state = shuffled.state_dict()
    with pytest.raises(InputError, match="order: shuffled then, contexts now"):
        stream(lm).load_state_dict(state)
    del state["stream"]["order"]
    shuffled.load_state_dict(state)
    with pytest.raises(InputError, match="order: shuffled then, contexts now"):
        stream(lm).load_state_dict(state)


def test_wrong_sizes_and_a_cache_are_refused(lm: LanguageModel):
    with pytest.raises(InputError, match="batch_size must be a multiple of context_size=12"):
        Batching(**{**SIZES, "batch_size": 50})
    with pytest.raises(InputError, match="order: contexts needs a language model that runs, and a cache has activations alone"):
        ActivationsDataModule(lm, Texts(documents()), tokens=480, batch_size=48, context_size=12, order="contexts", cache="folder")


def test_held_out_batches_are_those_of_shuffled_training(lm: LanguageModel):
    modules = [
        ActivationsDataModule(lm, Texts(documents(80)), tokens=480, **{**SIZES, "order": order, "validation_tokens": 96})
        for order in ("contexts", "shuffled")
    ]
    contexts, shuffled = (list(module.val_dataloader()) for module in modules)
    assert contexts[0].contexts is None and len(contexts) == 2
    assert all(torch.equal(a.activations, b.activations) for a, b in zip(contexts, shuffled, strict=True))
    assert next(iter(modules[0].train_dataloader())).contexts is not None

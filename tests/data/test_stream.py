import copy
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import pytest
import torch

from metasae_lightning.corpora import split_of
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.masks import trainable_tokens
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM
from tests.helpers.models import Texts, documents, save_model

HELD_OUT = 0.2
SIZES = {"tokens": 640, "batch_size": 16, "context_size": 12, "buffer_size": 100, "forward_batch": 3, "held_out": HELD_OUT}
# Tests that compare with passes of their own run them without a mask.
SIZES |= {"cross_document_attention": True}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    model = HuggingFaceLM(
        str(save_model(tmp_path_factory.mktemp("stream") / "tiny", "llama", layers=2)), "blocks.1.hook_resid_post", device="cpu"
    )
    model.load()
    return model


@pytest.fixture
def forward_inputs(lm, monkeypatch):
    inputs = []
    activations = lm.activations
    monkeypatch.setattr(lm, "activations", lambda tokens, visible=None: inputs.append(tokens) or activations(tokens, visible))
    return inputs


def stream(lm, texts=None, **changes) -> ActivationStream:
    arguments = {"split": "train", **SIZES, **changes}
    batching = Batching(**{name: arguments.pop(name) for name in list(arguments) if name in Batching.__dataclass_fields__})
    stream_slice = StreamSlice(**{name: arguments.pop(name) for name in list(arguments) if name in StreamSlice.__dataclass_fields__})
    return ActivationStream(Texts(documents() if texts is None else texts), lm, batching, stream_slice, **arguments)


def batches(stream, count=None):
    return [batch.activations for batch in islice(stream, count)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows(parts) -> set[bytes]:
    return {row.numpy().tobytes() for part in parts for row in part}


def test_the_stream_yields_as_many_full_batches_as_the_token_budget_holds(lm):
    all_batches = batches(stream(lm, tokens=650))
    assert len(stream(lm, tokens=650)) == len(all_batches) == 40  # 650 // 16
    assert {tuple(batch.shape) for batch in all_batches} == {(16, 32)}


def test_batches_are_determined_by_the_seed(lm):
    first = batches(stream(lm))
    assert same(first, batches(stream(lm)))
    assert not any(torch.equal(a, b) for a, b in zip(first, batches(stream(lm, seed=1)), strict=True))


def test_the_global_rng_is_neither_used_nor_changed(lm):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = batches(stream(lm), 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, batches(stream(lm), 10))


def test_every_row_is_yielded_once_and_shuffled_within_its_block(lm, forward_inputs):
    yielded = torch.cat(batches(stream(lm)))
    special = torch.tensor(lm.tokenizer.all_special_ids)
    passes = [lm.activations(tokens)[trainable_tokens(tokens, special)] for tokens in list(forward_inputs)]
    expected = torch.cat(passes)[: len(yielded)]
    # The multiset of rows is that of the forward passes, in another order; the last block ends with the budget.
    assert sorted(row.numpy().tobytes() for row in yielded) == sorted(row.numpy().tobytes() for row in expected)
    assert not torch.equal(yielded, expected)
    # A row moves within its block of 96 (the buffer of 100 in whole batches): block by block the multisets agree too.
    for begin in range(0, len(yielded), 96):
        assert rows([yielded[begin : begin + 96]]) == rows([expected[begin : begin + 96]])


def test_the_stream_runs_no_more_forward_passes_than_the_budget_needs(lm, forward_inputs):
    batches(stream(lm))
    # A pass of 3 contexts of 12 has at most 33 tokens without BOS, and fewer where EOS ends a document.
    special = torch.tensor(lm.tokenizer.all_special_ids)
    n_trainable = [int(trainable_tokens(tokens, special).sum()) for tokens in forward_inputs]
    assert sum(n_trainable[:-1]) < 640 <= sum(n_trainable)


def test_skip_positions_leaves_first_positions_out_of_batches_and_in_the_forward_pass(lm, forward_inputs):
    yielded = rows(batches(stream(lm, skip_positions=3)))
    inputs = list(forward_inputs)
    assert rows([lm.activations(tokens)[:, :3].flatten(0, 1) for tokens in inputs]).isdisjoint(yielded)
    # The control: without the option, batches have the second and third positions.
    assert not rows([lm.activations(tokens)[:, 1:3].flatten(0, 1) for tokens in inputs]).isdisjoint(rows(batches(stream(lm))))


def test_max_norm_ratio_drops_rows_of_large_norm_and_keeps_all_others_in_place(lm):
    unfiltered, filtered = batches(stream(lm)), batches(stream(lm, max_norm_ratio=1.2))
    n_dropped = 0
    for before, after in zip(unfiltered, filtered, strict=True):
        norms = before.norm(dim=-1)
        assert torch.equal(after, before[norms <= 1.2 * norms.median()])
        n_dropped += len(before) - len(after)
    assert 0 < n_dropped < 0.5 * sum(map(len, unfiltered))


def test_special_tokens_are_in_the_forward_pass_and_never_in_batches(lm, forward_inputs):
    yielded = batches(stream(lm))
    special = torch.tensor(lm.tokenizer.all_special_ids)
    inputs = list(forward_inputs)
    assert all((tokens[:, 0] == lm.tokenizer.bos_token_id).all() for tokens in inputs)
    assert any((tokens == lm.tokenizer.eos_token_id).any() for tokens in inputs)
    special_rows = rows([lm.activations(tokens)[~trainable_tokens(tokens, special)] for tokens in inputs])
    assert special_rows.isdisjoint(rows(yielded))
    # The control: the special tokens' rows are among the unmasked rows.
    all_rows = rows([lm.activations(tokens).flatten(0, 1) for tokens in inputs])
    assert special_rows <= all_rows


def test_contexts_pack_the_documents_tokens_in_order_with_eos_between(lm, forward_inputs):
    texts = documents(6)
    batches(stream(lm, texts, held_out=0.0, tokens=64, batch_size=16, buffer_size=16))
    tokenizer = lm.tokenizer
    packed = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    inputs = torch.cat(forward_inputs)
    assert inputs.shape[1] == 12
    assert inputs[:, 1:].flatten().tolist() == packed[: 11 * len(inputs)]


def test_prepend_bos_false_leaves_bos_out_of_contexts(lm, forward_inputs):
    batches(stream(lm, prepend_bos=False), 3)
    assert not any((tokens == lm.tokenizer.bos_token_id).any() for tokens in forward_inputs)


@pytest.mark.parametrize("bos", [True, False])
def test_contexts_start_with_bos_or_with_eos_if_the_tokenizer_has_no_bos(tmp_path, bos):
    model = HuggingFaceLM(str(save_model(tmp_path / "tiny", "llama", layers=1, bos=bos)), "blocks.0.hook_resid_post", device="cpu")
    model.load()
    assert (model.tokenizer.bos_token_id is None) == (not bos)
    first, _ = stream(model).row_reader().next_pass()
    assert (first[:, 0] == (model.tokenizer.bos_token_id if bos else model.tokenizer.eos_token_id)).all()


@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 12, 23, 39])
def test_a_restored_stream_yields_the_remaining_batches_bit_for_bit(lm, at):
    # A block has 6 batches: positions before, at and after block boundaries, and before the budget's last batch.
    expected = batches(stream(lm))
    interrupted = stream(lm)
    iterator = iter(interrupted)
    assert same(batches(iterator, at), expected[:at])
    state = interrupted.state_dict()
    assert state["batches"] == at
    restored = stream(lm)
    restored.load_state_dict(state)
    assert same(batches(restored), expected[at:])


def test_restoring_runs_the_model_from_the_current_block_on_only(lm, forward_inputs):
    saved, restored = stream(lm), stream(lm)
    batches(saved, 36)
    state, n_passes = saved.state_dict(), len(forward_inputs)
    forward_inputs.clear()
    restored.load_state_dict(state)
    batches(restored)
    # Block 6 begins at row 576 of 640; a pass holds at least 24 rows, so 64 rows need 4 at most.
    assert len(forward_inputs) <= 4 < n_passes


def test_a_second_iterator_continues_a_train_stream_and_a_finished_one_starts_over(lm):
    expected = batches(stream(lm))
    interrupted = stream(lm)
    assert same(batches(interrupted, 7) + batches(interrupted), expected)
    assert same(batches(interrupted), expected)


def test_a_second_iterator_of_a_held_out_stream_starts_over(lm):
    held_out = stream(lm, split="validation", tokens=64)
    assert same(batches(held_out, 2), batches(held_out, 2))


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"seed": 3}, {"context_size": 10}, {"world_size": 2}])
def test_state_of_a_stream_with_other_arguments_is_refused(lm, change):
    state = stream(lm, **change).state_dict()
    with pytest.raises(InputError, match=next(iter(change))):
        stream(lm).load_state_dict(state)


def texts_of(forward_inputs, lm) -> set[str]:
    text = "".join(lm.tokenizer.decode(row[1:]) for tokens in forward_inputs for row in tokens)
    return {piece.split(":")[0] for piece in text.split("document ")[1:] if ":" in piece}


def test_each_split_reads_exactly_its_own_documents(lm, forward_inputs):
    read_by_split = {}
    for split in ("train", "validation", "test"):
        forward_inputs.clear()
        batches(stream(lm, split=split, tokens=2000))
        read_by_split[split] = texts_of(forward_inputs, lm)
        assert read_by_split[split] == {str(i) for i, text in enumerate(documents()) if split_of(text, HELD_OUT) == split}
        assert read_by_split[split]


def test_two_ranks_read_disjoint_documents_whose_union_is_that_of_one_rank(lm, forward_inputs):
    documents_read = []
    for rank, world_size in ((0, 2), (1, 2), (0, 1)):
        forward_inputs.clear()
        batches(stream(lm, rank=rank, world_size=world_size, tokens=1600))
        documents_read.append(texts_of(forward_inputs, lm))
    assert documents_read[0].isdisjoint(documents_read[1])
    assert documents_read[0] | documents_read[1] == documents_read[2]


def test_an_exhausted_corpus_is_logged_and_starts_over_in_another_order(lm, forward_inputs, caplog):
    texts = documents(5)
    batches(stream(lm, texts, held_out=0.0, tokens=800))
    assert "the train split's 5 documents are exhausted; epoch 1 begins" in caplog.text
    tokens = torch.cat(forward_inputs)[:, 1:].flatten().tolist()
    order = [int(piece.split(":")[0]) for piece in lm.tokenizer.decode(tokens).split("document ")[1:11]]
    assert order == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]


def test_documents_of_token_ids_are_packed_unchanged(lm, forward_inputs):
    ids = [[5, 6, 7, 8], [9, 10, 11, 12, 13]] * 10
    batches(stream(lm, ids, held_out=0.0, tokens=32), 1)
    assert torch.cat(forward_inputs)[0].tolist() == [0, 5, 6, 7, 8, 1, 9, 10, 11, 12, 13, 1]


def test_the_buffer_is_allocated_once_and_no_larger_than_buffer_size(lm, monkeypatch):
    sizes = []
    empty = torch.empty
    monkeypatch.setattr("metasae_lightning.data.stream.torch.empty", lambda *shape, **k: sizes.append(shape[0]) or empty(*shape, **k))
    batches(stream(lm))
    assert sizes == [96]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buffer_size": 15}, "buffer_size must hold a batch of 16 tokens, got 15"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"tokens": 3}, "tokens must fill a batch of 16, got 3"),
        ({"context_size": 1}, "context_size must be at least 2, got 1"),
        ({"held_out": 0.5}, "held_out must be in"),
        ({"rank": 2, "world_size": 2}, "rank must be in"),
        ({"context_size": 65}, "context_size must be at most 64"),
        ({"held_out": 0.0, "split": "validation"}, "no document with text"),
        ({"texts": []}, "no document with text"),
        ({"texts": ["", ""]}, "no document with text"),
        ({"texts": [[5, 300]], "held_out": 0.0}, "token ids must be in the tokenizer's range, 0 to 299, got 5 to 300"),
    ],
)
def test_arguments_out_of_range_are_refused_in_one_line(lm, change, message):
    with pytest.raises(InputError) as caught:
        batches(stream(lm, **change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prepend_bos_is_refused_without_bos_and_eos_tokens(tmp_path):
    folder = save_model(tmp_path / "tiny", "llama", layers=1, bos=False, eos=False)
    model = HuggingFaceLM(str(folder), "blocks.0.hook_resid_post", device="cpu")
    model.load()
    with pytest.raises(InputError, match="prepend_bos"):
        batches(stream(model))
    assert len(batches(stream(model, prepend_bos=False), 2)) == 2


# Hooks are registered on the shared module: one thread's forward pass must not trigger another thread's hook.
def test_streams_in_parallel_threads_on_one_model_yield_the_same_batches_as_alone(lm):
    expected = {split: batches(stream(lm, split=split, tokens=320)) for split in ("train", "validation", "test")}
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            futures = {split: pool.submit(batches, stream(lm, split=split, tokens=320, prefetch=2)) for split in expected}
        assert all(same(futures[split].result(), expected[split]) for split in expected)


def test_exhausted_end_holds_after_restoring_on_another_world_size(lm):
    texts, options = documents(300), {"exhausted": "end", "tokens": 100_000, "buffer_size": 3200}  # more tokens than the corpus has
    saved = stream(lm, texts, **options)
    batches(saved, 100)
    ranks = [stream(lm, texts, **options, rank=rank, world_size=2) for rank in range(2)]
    for rank_stream in ranks:
        rank_stream.load_other_world_size([saved.state_dict()])
        assert rank_stream.state_dict()["origin"] == 50 and 60 < len(rank_stream) < 250
    assert len(batches(ranks[0])) == len(batches(ranks[1])) == len(ranks[0]) - 50


@pytest.mark.parametrize(("at", "refused"), [(36, False), (38, True)])
def test_a_larger_budget_is_refused_from_within_the_last_block_of_the_smaller_one(lm, at, refused):
    saved, restored = stream(lm), stream(lm, tokens=960)  # 40 batches, 6 a block: the last block has 4
    batches(saved, at)
    if refused:
        with pytest.raises(InputError, match=r"tokens: the checkpoint stands in the last 64 of its budget.* 640 a rank, got 960"):
            restored.load_state_dict(saved.state_dict())
        return
    restored.load_state_dict(saved.state_dict())
    assert same(batches(restored), batches(stream(lm, tokens=960))[36:])


@pytest.mark.parametrize("checkpoint_buffer", ["tokens", "activations"])
@pytest.mark.parametrize(("tokens", "at"), [(576, 36), (640, 35)])
def test_a_longer_stream_goes_on_with_its_own_batches(lm, tokens, at, checkpoint_buffer):
    saved, restored = (stream(lm, tokens=tokens, checkpoint_buffer=checkpoint_buffer) for tokens in (tokens, 960))
    iterator = iter(saved)
    list(islice(iterator, at))  # all 36 batches, which fill 6 blocks; or 35 of 40, whose last block is shorter than in the longer stream
    restored.load_state_dict(saved.state_dict())
    iterator.close()
    assert same(batches(restored), batches(stream(lm, tokens=960))[at:])


def test_a_stream_at_its_end_inside_a_block_goes_on_after_every_document_that_it_has_read(lm, forward_inputs, caplog):
    texts = documents(300)
    saved, restored = stream(lm, texts), stream(lm, texts, tokens=960)  # 40 batches, 6 a block
    batches(saved, 40)
    read_before = texts_of(forward_inputs, lm)
    forward_inputs.clear()
    restored.load_state_dict(saved.state_dict())
    rest = batches(restored)
    assert "the stream goes on after its last block of 64 rows" in caplog.text and len(rest) == 20
    assert read_before and texts_of(forward_inputs, lm) and read_before.isdisjoint(texts_of(forward_inputs, lm))
    # It is resumed as any other.
    stopped, resumed = stream(lm, texts, tokens=960), stream(lm, texts, tokens=960)
    stopped.load_state_dict(saved.state_dict())
    batches(stopped, 7)
    resumed.load_state_dict(stopped.state_dict())
    assert same(batches(resumed), rest[7:])


def test_state_of_another_model_revision_is_refused_in_both_directions(lm, tmp_path):
    no_revision, with_revision = stream(lm), stream(lm)
    with_revision.language_model = copy.copy(lm)
    with_revision.language_model.model_kwargs = {"revision": "step1000"}
    for target, source in ((no_revision, with_revision), (with_revision, no_revision)):
        with pytest.raises(InputError, match="model_kwargs"):
            target.load_state_dict(source.state_dict())


# The reader stores the start of each block that may still be restored, not of every block of the corpus.
def test_counting_rows_stores_at_most_two_block_starts(lm):
    reader = stream(lm).row_reader()
    assert reader.count_rows(640) == 640
    assert len(reader._block_starts) <= 2
    reader.close()

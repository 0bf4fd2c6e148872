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
def recorded(lm, monkeypatch):
    seen = []
    plain = lm.activations
    monkeypatch.setattr(lm, "activations", lambda tokens, visible=None: seen.append(tokens) or plain(tokens, visible))
    return seen


def stream(lm, texts=None, **changes) -> ActivationStream:
    arguments = {"split": "train", **SIZES, **changes}
    batching = Batching(**{name: arguments.pop(name) for name in list(arguments) if name in Batching.__dataclass_fields__})
    part = StreamSlice(**{name: arguments.pop(name) for name in list(arguments) if name in StreamSlice.__dataclass_fields__})
    return ActivationStream(Texts(documents() if texts is None else texts), lm, batching, part, **arguments)


def batches(stream, count=None):
    return [batch.activations for batch in islice(stream, count)]


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def rows(parts) -> set[bytes]:
    return {row.numpy().tobytes() for part in parts for row in part}


def test_as_many_whole_batches_as_the_budget_holds(lm):
    given = batches(stream(lm, tokens=650))
    assert len(stream(lm, tokens=650)) == len(given) == 40  # 650 // 16
    assert {tuple(batch.shape) for batch in given} == {(16, 32)}


def test_same_arguments_same_batches_other_seed_other_batches(lm):
    first = batches(stream(lm))
    assert same(first, batches(stream(lm)))
    assert not any(torch.equal(a, b) for a, b in zip(first, batches(stream(lm, seed=1)), strict=True))


def test_the_global_random_state_is_neither_read_nor_moved(lm):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = batches(stream(lm), 10)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, batches(stream(lm), 10))


def test_every_row_is_handed_out_once_and_shuffled(lm, recorded):
    given = torch.cat(batches(stream(lm)))
    special = torch.tensor(lm.tokenizer.all_special_ids)
    passes = [lm.activations(tokens)[trainable_tokens(tokens, special)] for tokens in list(recorded)]
    expected = torch.cat(passes)[: len(given)]
    # Same multiset of rows as the model gave, in another order: the budget's last block is as short as the budget leaves it.
    assert sorted(row.numpy().tobytes() for row in given) == sorted(row.numpy().tobytes() for row in expected)
    assert not torch.equal(given, expected)
    # A row moves within its block of 96 (the buffer of 100 in whole batches): block by block the multisets agree too.
    for begin in range(0, len(given), 96):
        assert rows([given[begin : begin + 96]]) == rows([expected[begin : begin + 96]])


def test_no_more_forward_passes_than_the_budget_needs(lm, recorded):
    batches(stream(lm))
    # 3 contexts of 12 hold at most 33 tokens beside BOS; EOS between documents costs the rest.
    special = torch.tensor(lm.tokenizer.all_special_ids)
    kept = [int(trainable_tokens(tokens, special).sum()) for tokens in recorded]
    assert sum(kept[:-1]) < 640 <= sum(kept)


def test_first_positions_are_seen_by_the_model_and_left_out_of_batches(lm, recorded):
    given = rows(batches(stream(lm, skip_positions=3)))
    seen = list(recorded)
    assert rows([lm.activations(tokens)[:, :3].flatten(0, 1) for tokens in seen]).isdisjoint(given)
    # The control: without it the second and third positions are there.
    assert not rows([lm.activations(tokens)[:, 1:3].flatten(0, 1) for tokens in seen]).isdisjoint(rows(batches(stream(lm))))


def test_sinks_are_left_out_and_nothing_else_moves(lm):
    whole, kept = batches(stream(lm)), batches(stream(lm, max_norm_ratio=1.2))
    dropped = 0
    for before, after in zip(whole, kept, strict=True):
        norms = before.norm(dim=-1)
        assert torch.equal(after, before[norms <= 1.2 * norms.median()])
        dropped += len(before) - len(after)
    assert 0 < dropped < 0.5 * sum(map(len, whole))


def test_special_tokens_are_seen_by_the_model_and_never_in_batches(lm, recorded):
    given = batches(stream(lm))
    special = torch.tensor(lm.tokenizer.all_special_ids)
    seen = list(recorded)
    assert all((tokens[:, 0] == lm.tokenizer.bos_token_id).all() for tokens in seen)
    assert any((tokens == lm.tokenizer.eos_token_id).any() for tokens in seen)
    of_special = rows([lm.activations(tokens)[~trainable_tokens(tokens, special)] for tokens in seen])
    assert of_special.isdisjoint(rows(given))
    # The control: with the mask off the same rows are there.
    everything = rows([lm.activations(tokens).flatten(0, 1) for tokens in seen])
    assert of_special <= everything


def test_contexts_hold_the_documents_tokens_in_order(lm, recorded):
    texts = documents(6)
    batches(stream(lm, texts, held_out=0.0, tokens=64, batch_size=16, buffer_size=16))
    tokenizer = lm.tokenizer
    packed = [t for text in texts for t in [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    seen = torch.cat(recorded)
    assert seen.shape[1] == 12
    assert seen[:, 1:].flatten().tolist() == packed[: 11 * len(seen)]


def test_without_bos_contexts_are_all_text(lm, recorded):
    batches(stream(lm, prepend_bos=False), 3)
    assert not any((tokens == lm.tokenizer.bos_token_id).any() for tokens in recorded)


@pytest.mark.parametrize("bos", [True, False])
def test_a_tokenizer_without_bos_begins_with_eos(tmp_path, bos):
    model = HuggingFaceLM(str(save_model(tmp_path / "tiny", "llama", layers=1, bos=bos)), "blocks.0.hook_resid_post", device="cpu")
    model.load()
    assert (model.tokenizer.bos_token_id is None) == (not bos)
    first, _ = stream(model).row_reader().next_pass()
    assert (first[:, 0] == (model.tokenizer.bos_token_id if bos else model.tokenizer.eos_token_id)).all()


@pytest.mark.parametrize("at", [0, 1, 5, 6, 7, 12, 23, 39])
def test_a_restored_stream_goes_on_bit_for_bit(lm, at):
    # 6 batches a block: before, at and after block boundaries, the last batch of the budget among them.
    whole = batches(stream(lm))
    interrupted = stream(lm)
    iterator = iter(interrupted)
    assert same(batches(iterator, at), whole[:at])
    state = interrupted.state_dict()
    assert state["batches"] == at
    again = stream(lm)
    again.load_state_dict(state)
    assert same(batches(again), whole[at:])


def test_restoring_does_not_run_the_model_on_what_is_gone(lm, recorded):
    early, late = stream(lm), stream(lm)
    batches(early, 36)
    state, all_passes = early.state_dict(), len(recorded)
    recorded.clear()
    late.load_state_dict(state)
    batches(late)
    # Block 6 begins at row 576 of 640; a pass holds at least 24 rows, so 64 rows need 4 at most.
    assert len(recorded) <= 4 < all_passes


def test_iterating_again_goes_on_and_finishing_starts_over(lm):
    whole = batches(stream(lm))
    interrupted = stream(lm)
    assert same(batches(interrupted, 7) + batches(interrupted), whole)
    assert same(batches(interrupted), whole)


def test_a_held_out_pass_cut_short_starts_over(lm):
    held_out = stream(lm, split="validation", tokens=64)
    assert same(batches(held_out, 2), batches(held_out, 2))


@pytest.mark.parametrize("change", [{"batch_size": 8}, {"seed": 3}, {"context_size": 10}, {"world_size": 2}])
def test_another_streams_state_is_refused(lm, change):
    other = stream(lm, **change).state_dict()
    with pytest.raises(InputError, match=next(iter(change))):
        stream(lm).load_state_dict(other)


def texts_of(recorded, lm) -> set[str]:
    text = "".join(lm.tokenizer.decode(row[1:]) for tokens in recorded for row in tokens)
    return {piece.split(":")[0] for piece in text.split("document ")[1:] if ":" in piece}


def test_splits_read_different_documents_and_together_all_of_them(lm, recorded):
    read = {}
    for split in ("train", "validation", "test"):
        recorded.clear()
        batches(stream(lm, split=split, tokens=2000))
        read[split] = texts_of(recorded, lm)
        assert read[split] == {str(i) for i, text in enumerate(documents()) if split_of(text, HELD_OUT) == split}
        assert read[split]


def test_ranks_read_different_documents_and_together_those_of_one(lm, recorded):
    read = []
    for rank, world_size in ((0, 2), (1, 2), (0, 1)):
        recorded.clear()
        batches(stream(lm, rank=rank, world_size=world_size, tokens=1600))
        read.append(texts_of(recorded, lm))
    assert read[0].isdisjoint(read[1])
    assert read[0] | read[1] == read[2]


def test_an_exhausted_corpus_is_told_and_begins_again_in_another_order(lm, recorded, caplog):
    texts = documents(5)
    batches(stream(lm, texts, held_out=0.0, tokens=800))
    assert "the train split's 5 documents are exhausted; epoch 1 begins" in caplog.text
    tokens = torch.cat(recorded)[:, 1:].flatten().tolist()
    order = [int(piece.split(":")[0]) for piece in lm.tokenizer.decode(tokens).split("document ")[1:11]]
    assert order == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]


def test_token_columns_are_taken_as_they_are(lm, recorded):
    ids = [[5, 6, 7, 8], [9, 10, 11, 12, 13]] * 10
    batches(stream(lm, ids, held_out=0.0, tokens=32), 1)
    assert torch.cat(recorded)[0].tolist() == [0, 5, 6, 7, 8, 1, 9, 10, 11, 12, 13, 1]


def test_the_buffer_is_never_larger_than_asked(lm, monkeypatch):
    sizes = []
    empty = torch.empty
    monkeypatch.setattr("metasae_lightning.data.stream.torch.empty", lambda *shape, **k: sizes.append(shape[0]) or empty(*shape, **k))
    batches(stream(lm))
    assert sizes == [96]


@pytest.mark.parametrize(
    ("change", "line"),
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
def test_what_cannot_be_is_one_line(lm, change, line):
    with pytest.raises(InputError) as caught:
        batches(stream(lm, **change))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_prepend_bos_needs_a_token_to_prepend(tmp_path):
    folder = save_model(tmp_path / "tiny", "llama", layers=1, bos=False, eos=False)
    model = HuggingFaceLM(str(folder), "blocks.0.hook_resid_post", device="cpu")
    model.load()
    with pytest.raises(InputError, match="prepend_bos"):
        batches(stream(model))
    assert len(batches(stream(model, prepend_bos=False), 2)) == 2


# A hook belongs to the module: a pass of another thread must not end at it, nor leave its activations here.
def test_streams_that_read_one_model_at_once_do_not_meet(lm):
    alone = {split: batches(stream(lm, split=split, tokens=320)) for split in ("train", "validation", "test")}
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            found = {split: pool.submit(batches, stream(lm, split=split, tokens=320, prefetch=2)) for split in alone}
        assert all(same(found[split].result(), alone[split]) for split in alone)


def test_on_another_number_of_ranks_the_end_of_the_corpus_is_still_the_end(lm):
    texts, ending = documents(300), {"exhausted": "end", "tokens": 100_000, "buffer_size": 3200}  # more than is left
    early = stream(lm, texts, **ending)
    batches(early, 100)
    ranks = [stream(lm, texts, **ending, rank=rank, world_size=2) for rank in range(2)]
    for one in ranks:
        one.load_other_world_size([early.state_dict()])
        assert one.state_dict()["origin"] == 50 and 60 < len(one) < 250
    assert len(batches(ranks[0])) == len(batches(ranks[1])) == len(ranks[0]) - 50


@pytest.mark.parametrize(("at", "refused"), [(36, False), (38, True)])
def test_the_budgets_last_block_is_not_shuffled_again(lm, at, refused):
    early, late = stream(lm), stream(lm, tokens=960)  # 40 batches, 6 a block: the last block has 4
    batches(early, at)
    if refused:
        with pytest.raises(InputError, match=r"tokens: the checkpoint stands in the last 64 of its budget.* 640 a rank, got 960"):
            late.load_state_dict(early.state_dict())
        return
    late.load_state_dict(early.state_dict())
    assert same(batches(late), batches(stream(lm, tokens=960))[36:])


def test_another_models_state_is_refused_either_way(lm, tmp_path):
    plain, other = stream(lm), stream(lm)
    other.language_model = copy.copy(lm)
    other.language_model.model_kwargs = {"revision": "step1000"}
    for one, two in ((plain, other), (other, plain)):
        with pytest.raises(InputError, match="model_kwargs"):
            one.load_state_dict(two.state_dict())


# A place is kept for each block that a buffer may need, not for every block of a corpus.
def test_counting_remembers_no_more_than_a_block(lm):
    reader = stream(lm).row_reader()
    assert reader.count_rows(640) == 640
    assert len(reader._block_starts) <= 2
    reader.close()

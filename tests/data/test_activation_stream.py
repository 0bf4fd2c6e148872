"""The stream's options: documents apart, storage, threads, saved buffers, other numbers of ranks, the corpus's end."""

import threading
import time
from itertools import islice

import pytest
import torch

from metasae_lightning.corpora import split_of
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.masks import document_mask
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM, TransformerLensLM
from tests.data.test_stream import batches, rows, same, stream, texts_of
from tests.helpers.models import Texts, documents, save_model

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("separate")
    return {name: str(save_model(root / name, name, layers=3)) for name in ("llama", "gpt2", "gemma2")}


@pytest.fixture(scope="module")
def lm(folders):
    model = HuggingFaceLM(folders["llama"], HOOK, device="cpu")
    model.load()
    return model


@pytest.fixture
def recorded(lm, monkeypatch):
    seen = []
    plain = lm.activations
    monkeypatch.setattr(lm, "activations", lambda tokens, visible=None: seen.append(tokens) or plain(tokens, visible))
    return seen


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_document_does_not_see_the_one_before_it(folders, architecture):
    model = HuggingFaceLM(folders[architecture], HOOK, device="cpu")
    model.load()
    if architecture == "gemma2":  # whose layers see four tokens back
        assert model.can_separate_documents(4) and not model.can_separate_documents(9)
        return
    assert model.can_separate_documents(9)
    # BOS, a document of three tokens and its EOS, one of four: the same second document behind two different first ones.
    one, two = torch.tensor([[0, 9, 8, 7, 1, 20, 21, 22, 23]]), torch.tensor([[0, 30, 31, 32, 1, 20, 21, 22, 23]])
    apart = [model.activations(tokens, document_mask(tokens, 1, starts_with_bos=True))[0] for tokens in (one, two)]
    together = [model.activations(tokens)[0] for tokens in (one, two)]
    torch.testing.assert_close(apart[0][5:], apart[1][5:])
    assert not torch.allclose(together[0][5:], together[1][5:], atol=1e-2)
    # The first document is what it is without a second.
    torch.testing.assert_close(apart[0][:5], model.activations(one[:, :5])[0], rtol=1e-4, atol=1e-5)


def test_a_backend_that_cannot_mask_says_so(folders):
    model = TransformerLensLM(folders["gpt2"], HOOK, device="cpu")
    model.load()
    assert not model.can_separate_documents(9)
    with pytest.raises(NotImplementedError):
        model.activations(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, 3).tril().bool())


def test_whether_documents_are_apart_changes_rows_and_not_which_they_are(lm):
    apart, together = (torch.cat(batches(stream(lm, cross_document_attention=value), 12)) for value in (False, True))
    assert apart.shape == together.shape
    changed = (apart - together).abs().amax(1) > 1e-4
    assert 0.02 < changed.float().mean() < 1


@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_thread_changes_nothing(lm, prefetch):
    assert same(batches(stream(lm)), batches(stream(lm, prefetch=prefetch)))


@pytest.mark.parametrize("checkpoint_buffer", ["tokens", "activations"])
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("at", [1, 6, 17, 33])
def test_restored_with_batches_made_ahead_and_with_saved_buffers(lm, checkpoint_buffer, prefetch, at):
    how = {"checkpoint_buffer": checkpoint_buffer, "prefetch": prefetch}
    whole = batches(stream(lm))
    interrupted = stream(lm, **how)
    iterator = iter(interrupted)
    assert same([b.activations for b in islice(iterator, at)], whole[:at])
    time.sleep(0.05)  # the thread is some batches further
    state = interrupted.state_dict()
    assert ("shelf" in state) == (checkpoint_buffer == "activations")
    iterator.close()
    again = stream(lm, **how)
    again.load_state_dict(state)
    iterator = iter(again)
    assert same([b.activations for b in islice(iterator, 4)], whole[at : at + 4])
    # And once more from there, in the middle of what was restored.
    state = again.state_dict()
    iterator.close()
    last = stream(lm, **how)
    last.load_state_dict(state)
    assert same(batches(last), whole[at + 4 :])


def test_a_saved_buffer_is_not_run_again(lm, recorded):
    early = stream(lm, checkpoint_buffer="activations")
    iterator = iter(early)
    list(islice(iterator, 8))
    state = early.state_dict()
    iterator.close()
    recorded.clear()
    late = stream(lm, checkpoint_buffer="activations")
    late.load_state_dict(state)
    assert len(batches(late, 1)) == 1
    assert len(recorded) <= 1


def test_restoring_reads_no_document_twice_before_its_block(lm):
    class Counted(Texts):
        tokenised = 0

    texts = Counted(documents())
    made = ActivationStream(texts, lm, Batching(16, 12, 32, 0.0, forward_batch=3), StreamSlice("train", 3200))
    iterator = iter(made)
    list(islice(iterator, 190))
    state = made.state_dict()
    iterator.close()
    # 190 batches of 16 are several epochs of 40 short documents: the place names the epoch, and nothing earlier is read again.
    assert state["cursor"]["tokens"]["place"]["epoch"] >= 1


def test_a_corpus_that_changed_is_noticed(lm):
    early = stream(lm)
    batches(early, 20)
    state = early.state_dict()
    changed = stream(lm, [text.replace("fox", "cat") for text in documents()])
    changed.corpus.description = early.corpus.description
    changed.load_state_dict(state)
    with pytest.raises(InputError, match="is not what it was when the checkpoint was written"):
        batches(changed, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_buffer_stores_what_it_is_asked_to(lm, dtype, monkeypatch):
    kinds = []
    empty = torch.empty
    monkeypatch.setattr(
        "metasae_lightning.data.activation_stream.torch.empty",
        lambda *shape, **k: kinds.append((k["dtype"], str(k["device"]))) or empty(*shape, **k),
    )
    plain, stored = batches(stream(lm), 10), batches(stream(lm, buffer_dtype=dtype, buffer_device="cpu"), 10)
    assert kinds == [(torch.float32, "cpu"), (getattr(torch, dtype), "cpu")]
    assert all(batch.dtype == torch.float32 for batch in stored)
    assert same(stored, [batch.to(getattr(torch, dtype)).float() for batch in plain])


def test_float16_that_would_overflow_is_one_line(lm, monkeypatch):
    plain = lm.activations
    monkeypatch.setattr(lm, "activations", lambda tokens, visible=None: plain(tokens, visible) * 1e6)
    with pytest.raises(InputError, match="buffer_dtype: float16 ends at 65504"):
        batches(stream(lm, buffer_dtype="float16"), 1)


def test_the_end_of_the_corpus_may_end_the_run(lm, recorded):
    finite = stream(lm, tokens=16 * 1000, exhausted="end")
    length = len(finite)
    assert 10 < length < 1000
    given = batches(finite)
    assert len(given) == length
    assert texts_of(recorded, lm) == {str(i) for i, text in enumerate(documents()) if split_of(text, 0.2) == "train"}
    assert same(given, batches(stream(lm, tokens=16 * length)))


def test_ranks_end_together(lm):
    lengths = {len(stream(lm, tokens=16 * 1000, exhausted="end", rank=rank, world_size=3)) for rank in range(3)}
    alone = [stream(lm, tokens=16 * 1000, exhausted="end", rank=rank, world_size=3) for rank in range(3)]
    assert len(lengths) == 1
    assert [len(batches(ours)) for ours in alone] == [lengths.pop()] * 3


def test_a_corpus_that_fills_no_batch_is_one_line(lm):
    with pytest.raises(InputError, match="does not fill one batch of 64 tokens"):
        len(stream(lm, documents(1), held_out=0.0, tokens=1600, batch_size=64, context_size=40, exhausted="end"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_other_numbers_of_ranks_go_on_behind_everything_read(lm, recorded, caplog, before, after):
    texts = documents(400)
    states = []
    for rank in range(before):
        ours = stream(lm, texts, rank=rank, world_size=before, tokens=16 * 60)
        batches(ours, 30 // before)
        states.append(ours.state_dict())
    read = texts_of(recorded, lm)
    recorded.clear()
    given = 0
    for rank in range(after):
        ours = stream(lm, texts, rank=rank, world_size=after, tokens=16 * 120 // after)
        ours.load_other_world_size(states)
        given += len(batches(ours)) * 16
    went_on = texts_of(recorded, lm)
    assert read and went_on and read.isdisjoint(went_on)
    assert f"restored on {after} ranks instead of {before}" in caplog.text
    # The budget of 120 batches in all, of which 30 were given.
    assert abs(given - 16 * 90) <= 16 * after


def test_several_hooks_from_one_pass_are_each_their_own(folders):
    names = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"]
    both = HuggingFaceLM(folders["llama"], names, device="cpu")
    both.load()
    assert both.widths == dict.fromkeys(names, 32) and both.d_model == 96
    given = next(iter(stream(both)))
    for name in names:
        single = HuggingFaceLM(folders["llama"], name, device="cpu")
        single.load()
        assert torch.equal(given.select_hook(name).activations, next(iter(stream(single))).activations)
    with pytest.raises(InputError, match="a list of different names"):
        HuggingFaceLM(folders["llama"], [HOOK, HOOK])


def test_no_thread_is_left_when_a_run_is_dropped(lm):
    before = threading.active_count()
    iterator = iter(stream(lm, prefetch=2))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_rows_are_the_same_whatever_the_buffer(lm):
    # The same rows leave, in other orders: 640 tokens of blocks of 96 and of one block.
    assert rows(batches(stream(lm))) == rows(batches(stream(lm, buffer_size=640)))

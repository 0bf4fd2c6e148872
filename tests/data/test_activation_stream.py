"""Options of ActivationStream: document masks, buffer dtype, prefetch, saved buffers, other world sizes, the end of the corpus."""

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
def recorded_inputs(lm, monkeypatch):
    forward_inputs = []
    activations = lm.activations
    monkeypatch.setattr(lm, "activations", lambda tokens, visible=None: forward_inputs.append(tokens) or activations(tokens, visible))
    return forward_inputs


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_document_mask_makes_activations_independent_of_the_previous_document(folders, architecture):
    model = HuggingFaceLM(folders[architecture], HOOK, device="cpu")
    model.load()
    if architecture == "gemma2":  # its sliding window is four tokens
        assert model.can_separate_documents(4) and not model.can_separate_documents(9)
        return
    assert model.can_separate_documents(9)
    # BOS, a document of three tokens with EOS, a document of four: both contexts have the same second document after different first ones.
    tokens_a, tokens_b = torch.tensor([[0, 9, 8, 7, 1, 20, 21, 22, 23]]), torch.tensor([[0, 30, 31, 32, 1, 20, 21, 22, 23]])
    masked = [model.activations(tokens, document_mask(tokens, 1, starts_with_bos=True))[0] for tokens in (tokens_a, tokens_b)]
    unmasked = [model.activations(tokens)[0] for tokens in (tokens_a, tokens_b)]
    torch.testing.assert_close(masked[0][5:], masked[1][5:])
    assert not torch.allclose(unmasked[0][5:], unmasked[1][5:], atol=1e-2)
    # The first document's activations equal those of a context without the second.
    torch.testing.assert_close(masked[0][:5], model.activations(tokens_a[:, :5])[0], rtol=1e-4, atol=1e-5)


def test_transformer_lens_reports_and_refuses_attention_masks(folders):
    model = TransformerLensLM(folders["gpt2"], HOOK, device="cpu")
    model.load()
    assert not model.can_separate_documents(9)
    with pytest.raises(NotImplementedError):
        model.activations(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, 3).tril().bool())


def test_cross_document_attention_changes_activations_and_not_their_tokens(lm):
    masked, unmasked = (torch.cat(batches(stream(lm, cross_document_attention=value), 12)) for value in (False, True))
    assert masked.shape == unmasked.shape
    changed = (masked - unmasked).abs().amax(1) > 1e-4
    assert 0.02 < changed.float().mean() < 1


@pytest.mark.parametrize("prefetch", [1, 4])
def test_prefetch_yields_the_same_batches(lm, prefetch):
    assert same(batches(stream(lm)), batches(stream(lm, prefetch=prefetch)))


@pytest.mark.parametrize("checkpoint_buffer", ["tokens", "activations"])
@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("at", [1, 6, 17, 33])
def test_a_stream_with_prefetch_or_a_saved_buffer_resumes_with_the_remaining_batches(lm, checkpoint_buffer, prefetch, at):
    options = {"checkpoint_buffer": checkpoint_buffer, "prefetch": prefetch}
    expected = batches(stream(lm))
    interrupted = stream(lm, **options)
    iterator = iter(interrupted)
    assert same([b.activations for b in islice(iterator, at)], expected[:at])
    time.sleep(0.05)  # lets the thread prefetch some batches
    state = interrupted.state_dict()
    assert ("shelf" in state) == (checkpoint_buffer == "activations")
    iterator.close()
    restored = stream(lm, **options)
    restored.load_state_dict(state)
    iterator = iter(restored)
    assert same([b.activations for b in islice(iterator, 4)], expected[at : at + 4])
    # A second save and restore, inside the restored block.
    state = restored.state_dict()
    iterator.close()
    restored_twice = stream(lm, **options)
    restored_twice.load_state_dict(state)
    assert same(batches(restored_twice), expected[at + 4 :])


def test_restoring_a_saved_buffer_runs_at_most_one_forward_pass(lm, recorded_inputs):
    saved = stream(lm, checkpoint_buffer="activations")
    iterator = iter(saved)
    list(islice(iterator, 8))
    state = saved.state_dict()
    iterator.close()
    recorded_inputs.clear()
    restored = stream(lm, checkpoint_buffer="activations")
    restored.load_state_dict(state)
    assert len(batches(restored, 1)) == 1
    assert len(recorded_inputs) <= 1


def test_state_of_a_later_epoch_names_that_epoch_as_its_position(lm):
    class Counted(Texts):
        tokenised = 0

    texts = Counted(documents())
    interrupted = ActivationStream(texts, lm, Batching(16, 12, 32, 0.0, forward_batch=3), StreamSlice("train", 3200))
    iterator = iter(interrupted)
    list(islice(iterator, 190))
    state = interrupted.state_dict()
    iterator.close()
    # 190 batches of 16 are several epochs of 40 short documents: the position names the epoch, so a restored stream starts in it.
    assert state["cursor"]["tokens"]["place"]["epoch"] >= 1


def test_restoring_on_a_changed_corpus_is_refused(lm):
    saved = stream(lm)
    batches(saved, 20)
    state = saved.state_dict()
    changed = stream(lm, [text.replace("fox", "cat") for text in documents()])
    changed.corpus.description = saved.corpus.description
    changed.load_state_dict(state)
    with pytest.raises(InputError, match="is not what it was when the checkpoint was written"):
        batches(changed, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_buffer_has_the_requested_dtype_and_batches_are_float32(lm, dtype, monkeypatch):
    allocated = []
    empty = torch.empty
    monkeypatch.setattr(
        "metasae_lightning.data.activation_stream.torch.empty",
        lambda *shape, **k: allocated.append((k["dtype"], str(k["device"]))) or empty(*shape, **k),
    )
    float32_batches, stored_batches = batches(stream(lm), 10), batches(stream(lm, buffer_dtype=dtype, buffer_device="cpu"), 10)
    assert allocated == [(torch.float32, "cpu"), (getattr(torch, dtype), "cpu")]
    assert all(batch.dtype == torch.float32 for batch in stored_batches)
    assert same(stored_batches, [batch.to(getattr(torch, dtype)).float() for batch in float32_batches])


def test_activations_above_the_float16_range_are_refused(lm, monkeypatch):
    activations = lm.activations
    monkeypatch.setattr(lm, "activations", lambda tokens, visible=None: activations(tokens, visible) * 1e6)
    with pytest.raises(InputError, match="buffer_dtype: float16 ends at 65504"):
        batches(stream(lm, buffer_dtype="float16"), 1)


def test_exhausted_end_stops_after_every_document_was_read_once(lm, recorded_inputs):
    finite = stream(lm, tokens=16 * 1000, exhausted="end")
    length = len(finite)
    assert 10 < length < 1000
    all_batches = batches(finite)
    assert len(all_batches) == length
    assert texts_of(recorded_inputs, lm) == {str(i) for i, text in enumerate(documents()) if split_of(text, 0.2) == "train"}
    assert same(all_batches, batches(stream(lm, tokens=16 * length)))


def test_exhausted_end_gives_all_ranks_the_same_number_of_batches(lm):
    lengths = {len(stream(lm, tokens=16 * 1000, exhausted="end", rank=rank, world_size=3)) for rank in range(3)}
    streams = [stream(lm, tokens=16 * 1000, exhausted="end", rank=rank, world_size=3) for rank in range(3)]
    assert len(lengths) == 1
    assert [len(batches(rank_stream)) for rank_stream in streams] == [lengths.pop()] * 3


def test_a_corpus_smaller_than_one_batch_is_refused(lm):
    with pytest.raises(InputError, match="does not fill one batch of 64 tokens"):
        len(stream(lm, documents(1), held_out=0.0, tokens=1600, batch_size=64, context_size=40, exhausted="end"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_restoring_on_another_world_size_continues_behind_every_document_read(lm, recorded_inputs, caplog, before, after):
    texts = documents(400)
    states = []
    for rank in range(before):
        rank_stream = stream(lm, texts, rank=rank, world_size=before, tokens=16 * 60)
        batches(rank_stream, 30 // before)
        states.append(rank_stream.state_dict())
    read_before = texts_of(recorded_inputs, lm)
    recorded_inputs.clear()
    n_tokens = 0
    for rank in range(after):
        rank_stream = stream(lm, texts, rank=rank, world_size=after, tokens=16 * 120 // after)
        rank_stream.load_other_world_size(states)
        n_tokens += len(batches(rank_stream)) * 16
    read_after = texts_of(recorded_inputs, lm)
    assert read_before and read_after and read_before.isdisjoint(read_after)
    assert f"restored on {after} ranks instead of {before}" in caplog.text
    # The budget is 120 batches over all ranks, of which 30 were used before.
    assert abs(n_tokens - 16 * 90) <= 16 * after


def test_several_hooks_in_one_pass_give_the_activations_of_single_hook_streams(folders):
    names = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"]
    all_hooks = HuggingFaceLM(folders["llama"], names, device="cpu")
    all_hooks.load()
    assert all_hooks.widths == dict.fromkeys(names, 32) and all_hooks.d_model == 96
    batch = next(iter(stream(all_hooks)))
    for name in names:
        single = HuggingFaceLM(folders["llama"], name, device="cpu")
        single.load()
        assert torch.equal(batch.select_hook(name).activations, next(iter(stream(single))).activations)
    with pytest.raises(InputError, match="a list of different names"):
        HuggingFaceLM(folders["llama"], [HOOK, HOOK])


def test_closing_the_iterator_ends_the_prefetch_thread(lm):
    before = threading.active_count()
    iterator = iter(stream(lm, prefetch=2))
    next(iterator)
    assert threading.active_count() > before
    iterator.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_the_buffer_size_changes_the_order_of_rows_and_not_the_set(lm):
    # 640 tokens shuffled in blocks of 96, and in one block.
    assert rows(batches(stream(lm))) == rows(batches(stream(lm, buffer_size=640)))

"""Batches for a GPU: a number of calls that does not grow, no value that the host waits for, and the batches of the plain algorithm."""

import contextlib
import threading
from collections import Counter
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from metasae_lightning.data import activation_stream, forward_passes
from metasae_lightning.data.forward_passes import Float16Check
from metasae_lightning.data.masks import trainable_tokens
from metasae_lightning.data.shuffle import batch_moves, permutation
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM
from tests.data.test_stream import batches, same, stream
from tests.helpers.models import documents, save_model


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceLM:
    folder = save_model(tmp_path_factory.mktemp("waits") / "tiny", "llama", layers=2)
    model = HuggingFaceLM(str(folder), "blocks.1.hook_resid_post", device="cpu")
    model.load()
    return model


class Calls(TorchDispatchMode):
    """Counts the operators that this thread calls."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def read_by_the_host(self) -> set[str]:
        """Operators whose result the host waits for on a GPU."""
        return set(self.counts) & {"_local_scalar_dense.default", "nonzero.default", "masked_select.default", "unique_dim.default"}


def calls_of_a_batch(lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch, **sizes: Any) -> Calls:
    """The calls of the third batch, which is inside the first block, without those inside the model."""
    with monkeypatch.context() as patch:
        patch.setattr(lm, "activations", lambda tokens, visible=None: torch.ones(*tokens.shape, 32))
        # A pass of one batch's tokens and more, so that the rows of a batch come from two passes at most.
        iterator = iter(stream(lm, documents(400), held_out=0.0, tokens=20_000, **sizes))
        list(islice(iterator, 2))
        with Calls() as calls:
            next(iterator)
        iterator.close()
    return calls


@pytest.mark.parametrize("cross_document_attention", [True, False])
def test_a_batch_takes_a_number_of_calls_that_grows_with_neither_batch_nor_buffer(
    lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch, cross_document_attention: bool
):
    option = {"cross_document_attention": cross_document_attention}
    few = calls_of_a_batch(lm, monkeypatch, batch_size=16, buffer_size=96, forward_batch=3, **option)
    many = calls_of_a_batch(lm, monkeypatch, batch_size=256, buffer_size=4096, forward_batch=48, **option)
    assert few.read_by_the_host == many.read_by_the_host == set()
    # One reading of the buffer, and a writing for each pass whose rows come in.
    for calls in (few, many):
        assert calls.counts["index_copy_.default"] <= 2
        assert calls.counts["index_select.default"] <= 3
        assert sum(calls.counts.values()) <= 40


# The control: the counter sees a value that the host reads.
def test_dropping_rows_by_norm_is_seen_to_read_a_value(lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch):
    calls = calls_of_a_batch(lm, monkeypatch, batch_size=16, buffer_size=96, forward_batch=3, max_norm_ratio=2.0)
    assert calls.read_by_the_host or calls.counts["index.Tensor"]


def test_batches_are_blocks_of_the_passes_rows_in_the_order_of_their_permutation(lm: HuggingFaceLM):
    reader, special = stream(lm).row_reader(), torch.tensor(lm.tokenizer.all_special_ids)
    rows: list[torch.Tensor] = []
    while sum(map(len, rows)) < 640:
        tokens, mask = reader.next_pass() or pytest.fail("the text ended")
        assert torch.equal(mask, trainable_tokens(tokens, special))
        rows.append(lm.activations(tokens)[mask])
    reader.close()
    # 640 rows in blocks of 96, the buffer of 100 in whole batches of 16.
    blocks = torch.cat(rows)[:640].split(96)
    shuffled = torch.cat([block[permutation(f"0/train/0/1/0/{number}", len(block))] for number, block in enumerate(blocks)])
    assert same(batches(stream(lm)), shuffled.split(16))


def test_documents_are_tokenized_and_packed_on_the_corpuss_thread_alone(lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch):
    threads: set[str] = set()

    def record(*args: Any, **kwargs: Any) -> Any:
        threads.add(threading.current_thread().name)
        return trainable_tokens(*args, **kwargs)

    monkeypatch.setattr("metasae_lightning.data.prepared_passes.trainable_tokens", record)
    batches(stream(lm), 5)
    assert threads == {"corpus 40 texts"}


# A batch that waited for the pass that refills its slots would make the SAE's step wait for the model.
def test_a_batch_is_ready_before_the_pass_that_refills_its_slots(lm: HuggingFaceLM, monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    activations = lm.activations
    monkeypatch.setattr(lm, "activations", lambda *args: order.append("pass") or activations(*args))
    made = stream(lm, batch_size=96)  # a batch is the whole buffer, so passes refill it at once
    monkeypatch.setattr(made, "_record_ready", lambda: order.append("ready"))
    iterator = iter(made)
    next(iterator)
    n_filling = order.index("ready")
    iterator.close()
    assert n_filling >= 3 and order[n_filling:].count("ready") == 1 and order[-1] == "pass"


def test_the_slots_of_a_block_are_copied_to_a_gpu_once(monkeypatch: pytest.MonkeyPatch):
    copied: list[int] = []
    monkeypatch.setattr(activation_stream, "copy_to", lambda tensor, device: copied.append(len(tensor)) or tensor.clone())

    def moves() -> Any:
        return batch_moves(96, 640, batch_size=16, order=lambda block, length: permutation(f"{block}", length))

    on_gpu = list(activation_stream._slots_on(torch.device("cuda"), moves()))
    assert copied == [96] * 6 + [64]
    for on_host, move in zip(moves(), on_gpu, strict=True):
        assert torch.equal(on_host.batch_slots, move.batch_slots) and torch.equal(on_host.refill_slots, move.refill_slots)


def test_on_a_gpu_a_float16_overflow_is_read_once_the_answer_is_there(monkeypatch: pytest.MonkeyPatch):
    is_there = False

    class OnGpu(torch.Tensor):
        """A tensor that says it is on a GPU."""

        device = torch.device("cuda", 0)  # type: ignore[assignment]

    event = SimpleNamespace(query=lambda: is_there, synchronize=lambda: None)
    monkeypatch.setattr(forward_passes.torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    check, rows = Float16Check(), torch.tensor([[1.0, float("inf")]]).as_subclass(OnGpu)
    check.add(rows)
    is_there = True
    with pytest.raises(InputError, match="float16 ends at 65504"):
        check.add(rows)
    with pytest.raises(InputError, match="float16 ends at 65504"):
        check.read(wait=True)


# transformers searches each pass for packed sequences, by a value that the host reads; contexts hold one sequence.
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_forward_pass_reads_no_value_and_has_the_activations_of_one_that_does(
    tmp_path: Any, architecture: str, monkeypatch: pytest.MonkeyPatch
):
    model = HuggingFaceLM(str(save_model(tmp_path / architecture, architecture, layers=2)), "blocks.1.hook_resid_post", device="cpu")
    model.load()
    tokens = torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    with Calls() as calls:
        activations = model.activations(tokens)
    assert calls.read_by_the_host == set()
    monkeypatch.setattr("metasae_lightning.lm.backends.one_sequence_per_context", contextlib.nullcontext)
    with Calls() as searching:
        assert torch.equal(model.activations(tokens), activations)
    assert searching.read_by_the_host == {"_local_scalar_dense.default"}

"""The GPU path of an evaluation, run on a CPU: the figures of the CPU path, and no host wait a passage."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

from metasae_lightning.compute.row_chunks import dry_run_scale
from metasae_lightning.evaluation import collect, pending_entries
from metasae_lightning.evaluation.bootstrap import PhiByGroup, sum_by_document
from metasae_lightning.evaluation.compare import best_matches, splits
from metasae_lightning.evaluation.held_out_text import Passage
from metasae_lightning.evaluation.padded_codes import PaddedCodes, room_for
from metasae_lightning.evaluation.pending_entries import PendingEntries
from metasae_lightning.evaluation.result_cache import ResultCache
from metasae_lightning.evaluation.saes import EvaluatedSAE
from metasae_lightning.evaluation.strongest_hits import SORTED_AT_ONCE, best_by_latent, strongest_hits
from metasae_lightning.metrics import Decomposition, Phi
from metasae_lightning.metrics.firings import DeviceFirings, Firings, SparseFirings
from metasae_lightning.metrics.reconstruction import sums_by_bin
from metasae_lightning.sae.learner import Learner
from metasae_lightning.step import Codes
from tests.evaluation.test_evaluate import evaluate_runs
from tests.helpers.device_calls import DeviceCalls
from tests.helpers.judged import D_IN, sae, write_run


@pytest.fixture
def gpu_path() -> Iterator[None]:
    with dry_run_scale(1.0, gpu=True):
        yield


def fired(tokens: int, rates: torch.Tensor, seed: int) -> torch.Tensor:
    return (torch.rand(tokens, len(rates), generator=torch.Generator().manual_seed(seed)) < rates).float()


def firings(dense: torch.Tensor) -> Firings:
    return Firings.of(dense.nonzero()[:, 1].int(), dense.sum(1).int(), dense.shape[1])


def subject(tmp_path: Path, d_sae: int = 48) -> EvaluatedSAE:
    return EvaluatedSAE("it", "it", tmp_path, sae(d_sae=d_sae))


def passage(contexts: int, x: torch.Tensor | None = None) -> Passage:
    """A passage of contexts of 16 tokens, a document each 10, all counted."""
    documents, counted = (torch.arange(contexts * 16) // 10).view(contexts, 16), torch.ones(contexts, 16, dtype=torch.bool)
    x = torch.randn(contexts * 16, D_IN, generator=torch.Generator().manual_seed(1)) if x is None else x
    return Passage(0, torch.zeros(contexts, 16, dtype=torch.long), documents, None, lambda: (x, counted))


def test_products_count_cofirings_as_sparse_matrices_do(gpu_path: None, monkeypatch: pytest.MonkeyPatch):
    a, b = (fired(500, torch.linspace(0, 0.4, width), seed) for seed, width in ((0, 23), (1, 31)))
    monkeypatch.setattr("metasae_lightning.metrics.firings.DENSE_ELEMENTS", 31 * 70)  # chunks of 70 tokens
    on_device = [firings(dense) for dense in (a, b)]
    assert all(isinstance(side, DeviceFirings) for side in on_device)
    with dry_run_scale(1.0):
        sparse = [firings(dense) for dense in (a, b)]
    assert all(isinstance(side, SparseFirings) for side in sparse)
    for others, expected in ((on_device, a.T @ b), ([on_device[0].shifted(120), on_device[1]], a.roll(120, 0).T @ b)):
        tiles = list(others[0].cofirings(others[1], 9))
        assert [start for start, _ in tiles] == [0, 9, 18]
        assert torch.equal(torch.cat([counts for _, counts in tiles]), expected.double())
    for side, other in zip(on_device, sparse, strict=True):
        assert torch.equal(side.counts, other.counts) and side.tokens == other.tokens == 500
        assert torch.equal(side.pair_cofirings([3, 22], [5, 22]), other.pair_cofirings([3, 22], [5, 22]))


def test_phi_and_matches_on_a_gpu_equal_those_on_a_cpu(gpu_path: None):
    a, b = fired(600, torch.linspace(0, 0.3, 40), 2), fired(600, torch.linspace(0.01, 0.3, 30), 3)
    b[:, :20] = a[:, 10:30]
    b[:, 28], b[:, 29] = a[:, 35] * (torch.arange(600) % 2), a[:, 35] * (torch.arange(600) % 2 == 0)

    def figures() -> tuple[dict[str, float], Any, Any]:
        phi = Phi(40, memory_gib=7 * 40 * 64 / 2**30)
        phi.update(Codes.from_dense(a))
        forward, backward = best_matches(firings(a), firings(b), 1e-4)
        return {name: value.item() for name, value in phi.compute().items()}, (forward, backward), splits(forward, firings(b))

    found, found_matches, found_splits = figures()
    with dry_run_scale(1.0):
        expected, expected_matches, expected_splits = figures()
    assert found == pytest.approx(expected, rel=1e-12) and 0.01 < found["mean_abs"] < 0.2
    for x, y in zip(found_matches, expected_matches, strict=True):
        assert torch.equal(x.phi, y.phi) and torch.equal(x.live, y.live)
    assert found_splits == expected_splits and found_splits[0]["latent"] == 35


def test_counting_pairs_waits_once_however_many_tiles_there_are(gpu_path: None):
    dense = fired(300, torch.linspace(0.01, 0.3, 40), 2)
    waits: list[dict[str, int]] = []
    for rows in (2, 20):
        phi = Phi(40, memory_gib=rows * 40 * 64 / 2**30)
        phi.update(Codes.from_dense(dense))
        with DeviceCalls() as calls:
            phi.count()
        assert calls.counts["mm"] == 40 // rows
        waits.append(calls.waits)
    assert waits[0] == waits[1] and sum(waits[0].values()) <= 7
    with dry_run_scale(1.0), DeviceCalls() as calls:
        phi.count()
    assert calls.waits["mask index"] == 2  # the control: one a tile on a CPU


def test_padded_codes_are_the_codes(tmp_path: Path):
    acts = fired(50, torch.linspace(0, 0.5, 33), 4) * torch.randn(50, 33, generator=torch.Generator().manual_seed(0))
    expected, padded = Codes.from_dense(acts), PaddedCodes.from_dense(acts, 33)
    is_filled = torch.arange(33) < padded.lengths[:, None]
    assert torch.equal(padded.latents[is_filled], expected.latents) and torch.equal(padded.values[is_filled], expected.values)
    assert torch.equal(padded.lengths, expected.lengths()) and not padded.values[~is_filled].any()
    short = PaddedCodes.from_dense(acts, 5)
    assert torch.equal(short.latents, padded.latents[:, :5]) and torch.equal(short.lengths, padded.lengths)


def test_an_entry_of_padded_codes_equals_that_of_exact_codes(tmp_path: Path, gpu_path: None):
    it, text = subject(tmp_path), passage(6)
    exact = collect.encode_passage(it, text, *text.read())
    lengths = exact["lengths"]
    assert room_for(lengths) > int(lengths.max()) > 4
    for room in (room_for(lengths), 4):  # enough room, and too little: then it is computed again
        found = collect.without_padding(it, text, collect.encode_passage(it, text, *text.read(), room))
        assert list(found) == list(exact)
        for name, value in exact.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)
            assert found[name].dtype == value.dtype
    with dry_run_scale(1.0):
        on_cpu = collect.encode_passage(it, text, *text.read())
    for name, value in on_cpu.items():
        torch.testing.assert_close(exact[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_encoding_a_passage_waits_for_nothing_and_makes_the_same_calls_at_every_size(tmp_path: Path, gpu_path: None):
    totals: list[int] = []
    for contexts, d_sae in ((4, 48), (40, 48), (4, 480)):
        it, text = subject(tmp_path, d_sae), passage(contexts)
        x, counted = text.read()
        with DeviceCalls() as calls:
            collect.encode_passage(it, text, x, counted, 64)
        # `owner` and the ids of its documents are on the CPU.
        assert calls.waits == {"mask index": 1, "_unique2": 2}
        totals.append(calls.total)
    assert totals[0] == totals[1] == totals[2] < 250
    it, text = subject(tmp_path), passage(4)
    with DeviceCalls() as calls:
        collect.encode_passage(it, text, *text.read())
    assert calls.waits["nonzero"] == 1  # the control: exact codes wait


def test_encoding_has_no_shape_that_depends_on_values(tmp_path: Path, gpu_path: None):
    it = subject(tmp_path)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(64, D_IN))
        padded, rebuilt = it.encode_decode_padded(x, 16)
        codes = padded.with_zeros()
        by_norm = sums_by_bin(codes.rows[:64], rebuilt.double(), 7)
    assert padded.values.shape == (64, 16) and codes.values.shape == (64 * 16,) and by_norm.shape == (7, D_IN)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(Exception, match="nonzero"):
        it.encode_decode(mode.from_tensor(torch.randn(64, D_IN)))


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.device("cuda")


def test_entries_on_a_device_are_written_together_and_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    waits: list[torch.device] = []
    monkeypatch.setattr(pending_entries, "wait_for_copies", waits.append)
    cache, entry = ResultCache(tmp_path), {"x": torch.arange(4.0).as_subclass(OnDevice)}
    with PendingEntries(max_bytes=48) as pending:
        for number in range(3):
            pending.put(cache, f"{number}", {}, entry, lambda entry: {"x": entry["x"] + 1})
            assert pending.has(cache, f"{number}", {}) and not cache.has(f"{number}", {})
        assert not waits
        pending.put(cache, "3", {}, entry)  # 64 bytes
        assert len(waits) == 1 and cache.has("3", {})
        pending.put(cache, "on the CPU", {}, {"x": torch.zeros(2)})
        assert cache.has("on the CPU", {}) and len(waits) == 1
    assert len(waits) == 1
    assert cache.get("0", {})["x"].tolist() == [1.0, 2.0, 3.0, 4.0] and cache.get("3", {})["x"].tolist() == [0.0, 1.0, 2.0, 3.0]

    def leave_by(error: type[BaseException]) -> None:
        with PendingEntries() as pending:
            pending.put(cache, error.__name__, {}, entry)
            raise error

    for error in (KeyboardInterrupt, RuntimeError):
        with pytest.raises(error):
            leave_by(error)
    assert cache.has("KeyboardInterrupt", {}) and not cache.has("RuntimeError", {})


class Recorded(collect.CollectedCodes):
    """Codes of passages in memory."""

    def codes(self, device: torch.device | str = "cpu") -> Iterator[tuple[Codes, dict[str, torch.Tensor]]]:
        return iter(self.text["passages"])


def recorded_passages(count: int, d_sae: int) -> list[tuple[Codes, dict[str, torch.Tensor]]]:
    """Codes of 50 of the 64 tokens of each passage, with equal values in several documents."""
    generator, passages = torch.Generator().manual_seed(0), list[tuple[Codes, dict[str, torch.Tensor]]]()
    for number in range(count):
        acts = fired(50, torch.linspace(0, 0.3, d_sae), number) * torch.randint(1, 6, (50, d_sae), generator=generator)
        counted = (torch.randperm(64, generator=generator) < 50).view(4, 16)
        owner = ((number * 64 + torch.arange(64)) // 23).view(4, 16)
        passages.append((Codes.from_dense(acts), {"counted": counted, "owner": owner}))
    return passages


@pytest.mark.parametrize("at_once", [1, SORTED_AT_ONCE])
def test_strongest_hits_on_a_gpu_are_those_on_a_cpu(at_once: int, tmp_path: Path, gpu_path: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("metasae_lightning.evaluation.strongest_hits.SORTED_AT_ONCE", at_once)
    recorded = Recorded(subject(tmp_path, 20), {"passages": recorded_passages(5, 20)}, [])
    chosen = torch.arange(20) != 7
    with DeviceCalls() as calls:
        found = strongest_hits(recorded, chosen, 3)
    assert calls.counts["sort"] > 3
    with dry_run_scale(1.0):
        expected = strongest_hits(recorded, chosen, 3)
    assert np.array_equal(found.values, expected.values) and np.array_equal(found.places, expected.places)
    assert 50 < len(found.values) <= 57 and 7 not in found.places[:, 0]


def test_the_best_hits_have_a_fixed_size():
    with FakeTensorMode():
        values, places = best_by_latent(torch.rand(100), torch.zeros(100, 4, dtype=torch.long), 7, 3)
    assert values.shape == (21,) and places.shape == (21, 4)


def test_counts_by_groups_of_documents_wait_for_nothing():
    codes = Codes.from_dense(fired(80, torch.linspace(0, 0.3, 16), 0))
    counts, group = PhiByGroup(16, 4), torch.arange(80) // 20
    with DeviceCalls() as calls:
        counts.update(codes, group)
    assert calls.waits == {} and int(counts.firings.sum()) == len(codes.values)
    assert torch.equal(counts.firings.sum(0), codes.firings().int()) and counts.tokens.tolist() == [20.0] * 4


def test_sums_by_document_are_products_on_a_gpu(gpu_path: None):
    documents, sums = torch.tensor([7, 3, 7, 9]), torch.randn(4, 3).double()
    ids, found = sum_by_document(documents, sums)
    with dry_run_scale(1.0):
        expected_ids, expected = sum_by_document(documents, sums)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


def test_a_fresh_critic_waits_for_nothing_but_its_learner(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Learner, "learn", lambda *_, **__: None)
    waits: list[dict[str, int]] = []
    for steps in (2, 40):
        metric = Decomposition(seeds=1, steps=steps, batch_size=8)
        with DeviceCalls() as calls:
            metric.variance_explained(torch.randn(16, 8), 0)
        waits.append(calls.waits)
    assert waits[0] == waits[1]


# Rows of a step were drawn one step at a time before: the same rows come from one draw.
def test_rows_drawn_together_are_those_drawn_step_by_step():
    one, other = (torch.Generator().manual_seed(3) for _ in range(2))
    assert torch.equal(
        torch.randint(20480, (5, 1024), generator=one), torch.stack([torch.randint(20480, (1024,), generator=other) for _ in range(5)])
    )


def test_an_evaluation_on_the_gpu_path_has_the_figures_of_the_cpu(tmp_path: Path):
    (expected,) = evaluate_runs(write_run(tmp_path, "cpu"), critic_seeds=0)
    with dry_run_scale(1.0, gpu=True):
        (found,) = evaluate_runs(write_run(tmp_path, "gpu"), critic_seeds=0)
    for group, figures in expected.entry["figures"].items():
        for name, value in figures.items():
            other = found.entry["figures"][group][name]
            assert other == (pytest.approx(value, rel=1e-6, nan_ok=True) if isinstance(value, float) else value), (group, name)
    for name, interval in expected.entry["intervals"].items():
        assert found.entry["intervals"][name] == pytest.approx(interval, rel=1e-6), name

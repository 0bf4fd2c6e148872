"""The data stream is deterministic: it yields the same batches in a second run and after kills and resumes."""

import random
import time
from pathlib import Path
from typing import Any

import pytest

from metasae_lightning.corpora import split_of
from tests.data.test_stream import texts_of
from tests.helpers.killed import data, run
from tests.helpers.models import documents, save_model
from tests.helpers.ranks import fork_context


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    save_model(root / "tiny", "llama", layers=2)
    (root / "text.txt").write_text("\n\n".join(documents(60)))
    return root


def uninterrupted_hashes(folder: Path, name: str, **changes: Any) -> list[str]:
    process = fork_context().Process(target=run, args=(folder, name, 0.0, changes))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return (folder / f"{name}.txt").read_text().split()


@pytest.mark.parametrize("changes", [{}, {"prefetch": 3}, {"checkpoint_buffer": "activations", "prefetch": 2}])
def test_a_stream_killed_at_ten_random_points_yields_the_batches_of_an_uninterrupted_one(folder: Path, changes: Any):
    name = "-".join(map(str, ["killed", *changes.values()]))
    expected = uninterrupted_hashes(folder, f"{name}-whole")
    assert len(expected) == 400 and len(set(expected)) == 400
    rng, kills = random.Random(0), 0
    while not (folder / f"{name}.done").exists():
        process = fork_context().Process(target=run, args=(folder, name, 0.004, changes))
        process.start()
        before = line_count(folder / f"{name}.txt")
        while kills < 10 and line_count(folder / f"{name}.txt") < before + 5 + rng.randrange(25) and process.is_alive():
            time.sleep(0.002)
        if kills < 10:
            process.kill()
            kills += 1
        process.join(300)
    assert kills == 10
    assert (folder / f"{name}.txt").read_text().split() == expected


def line_count(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_batches_are_determined_by_the_seed(folder: Path):
    first, second, other = (uninterrupted_hashes(folder, name, seed=seed) for name, seed in (("one", 0), ("two", 0), ("three", 1)))
    assert first == second
    assert not set(first) & set(other)


def test_held_out_documents_are_never_trained_on(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Over two epochs, two ranks and a restore in the middle."""
    texts = documents(60)
    held_out = {str(i) for i, text in enumerate(texts) if split_of(text, 0.1) != "train"}
    trained: set[str] = set()
    for rank in range(2):
        module = data(folder, tokens=2 * 16 * 400)
        module.setup()
        inputs: list[Any] = []
        activations = module.language_model.activations
        monkeypatch.setattr(
            module.language_model,
            "activations",
            lambda t, v=None, activations=activations, inputs=inputs: inputs.append(t) or activations(t, v),
        )
        module.trainer = type("Place", (), {"global_rank": rank, "world_size": 2})()  # type: ignore[assignment]
        stream = module.stream("train", 2 * 16 * 400)
        for _, _ in zip(range(150), stream, strict=False):
            pass
        state = stream.state_dict()
        assert state["reached"]["epoch"] >= 1
        restored = module.stream("train", 2 * 16 * 400)
        restored.load_state_dict(state)
        assert len(list(restored)) == 250
        trained |= texts_of(inputs, module.language_model)
    assert held_out and not trained & held_out
    assert trained | held_out == {str(i) for i in range(60)}

"""The data stream is deterministic: it gives the same batches twice, and after it was killed and resumed."""

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


def whole(folder: Path, name: str, **changes: Any) -> list[str]:
    process = fork_context().Process(target=run, args=(folder, name, 0.0, changes))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return (folder / f"{name}.txt").read_text().split()


@pytest.mark.parametrize("changes", [{}, {"prefetch": 3}, {"checkpoint_buffer": "activations", "prefetch": 2}])
def test_a_stream_killed_at_ten_random_points_gives_the_batches_of_an_uninterrupted_one(folder: Path, changes: Any):
    name = "-".join(map(str, ["killed", *changes.values()]))
    expected = whole(folder, f"{name}-whole")
    assert len(expected) == 400 and len(set(expected)) == 400
    when, kills = random.Random(0), 0
    while not (folder / f"{name}.done").exists():
        process = fork_context().Process(target=run, args=(folder, name, 0.004, changes))
        process.start()
        before = lines(folder / f"{name}.txt")
        while kills < 10 and lines(folder / f"{name}.txt") < before + 5 + when.randrange(25) and process.is_alive():
            time.sleep(0.002)
        if kills < 10:
            process.kill()
            kills += 1
        process.join(300)
    assert kills == 10
    assert (folder / f"{name}.txt").read_text().split() == expected


def lines(file: Path) -> int:
    return file.read_text().count("\n") if file.exists() else 0


def test_a_stream_repeats_and_another_seed_gives_other_batches(folder: Path):
    first, second, other = (whole(folder, name, seed=seed) for name, seed in (("one", 0), ("two", 0), ("three", 1)))
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
        seen: list[Any] = []
        plain = module.language_model.activations
        monkeypatch.setattr(module.language_model, "activations", lambda t, v=None, plain=plain, seen=seen: seen.append(t) or plain(t, v))
        module.trainer = type("Place", (), {"global_rank": rank, "world_size": 2})()  # type: ignore[assignment]
        stream = module.stream("train", 2 * 16 * 400)
        for _, _ in zip(range(150), stream, strict=False):
            pass
        state = stream.state_dict()
        assert state["reached"]["epoch"] >= 1
        again = module.stream("train", 2 * 16 * 400)
        again.load_state_dict(state)
        assert len(list(again)) == 250
        trained |= texts_of(seen, module.language_model)
    assert held_out and not trained & held_out
    assert trained | held_out == {str(i) for i in range(60)}

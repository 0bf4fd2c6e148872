"""Corpora: formats, shuffled orders, readers that resume, errors of one line, and the split by document."""

import ast
import gzip
import json
import re
import sysconfig
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from metasae_lightning.corpora import Corpus, HubText, InMemory, PythonDocs, SavedDataset, TextFiles, check_held_out, split_of
from metasae_lightning.corpora.python_docs import _docstrings
from metasae_lightning.errors import InputError

PINNED = ["train", "train", "train", "train", "validation", "test", "validation", "train"]
TEXTS = [f"text number {i}" for i in range(50)]


def read(corpus: Corpus, **order) -> list:
    """All documents of one epoch."""
    return list(corpus.documents(**order))


def read_error(corpus: Corpus) -> str:
    """The one-line error that reading the corpus raises."""
    with pytest.raises(InputError) as caught:
        read(corpus)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def json_lines(file: Path, rows) -> Path:
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def folder(tmp_path):
    """A folder with the same 50 texts in four files: `.txt`, `.jsonl`, `.jsonl.gz` and `.parquet`, and one file of another suffix."""
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS) + "\n\n\n")
    json_lines(tmp_path / "b.jsonl", [{"text": text, "n": 1} for text in TEXTS])
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in TEXTS))
    (tmp_path / "deeper").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "deeper" / "d.parquet")
    (tmp_path / "notes.md").write_text("not a document")
    return tmp_path


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.jsonl.gz", "deeper/d.parquet"])
def test_each_format_gives_every_document_once(folder, name):
    assert sorted(read(TextFiles(str(folder / name)))) == sorted(TEXTS)


def test_folders_globs_and_lists_read_every_matching_file_once(folder):
    four_times = Counter(dict.fromkeys(TEXTS, 4))
    assert Counter(read(TextFiles(str(folder)))) == four_times
    assert Counter(read(TextFiles([str(folder / "*.*"), str(folder / "deeper"), str(folder / "a.txt")]))) == four_times
    assert Counter(read(TextFiles(str(folder / "**" / "*.parquet")))) == Counter(TEXTS)


def test_a_paragraph_of_a_text_file_is_one_document_with_its_line_breaks(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n   \n\n\nthree\n")
    assert sorted(read(TextFiles(str(tmp_path)))) == ["one\ntwo", "three"]


def save_dataset(tmp_path) -> str:
    """A folder written by `save_to_disk`, with a text column and a column of token ids."""
    datasets.Dataset.from_dict({"text": TEXTS, "ids": [[i, i + 1] for i in range(50)]}).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


@pytest.mark.parametrize("make", [lambda p: TextFiles(str(p / "b.jsonl")), lambda p: SavedDataset(save_dataset(p)), lambda _: PythonDocs()])
def test_the_order_of_documents_depends_on_seed_and_epoch(folder, make):
    def first(**order):
        return list(islice(make(folder).documents(**order), 40))

    assert first(seed=1, epoch=2) == first(seed=1, epoch=2)
    assert len({tuple(first(seed=s, epoch=e)) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4


def test_saved_datasets_have_splits_and_columns_of_text_or_tokens(tmp_path):
    path = save_dataset(tmp_path)
    assert sorted(read(SavedDataset(path))) == sorted(TEXTS)
    assert sorted(read(SavedDataset(path, "ids"))) == [[i, i + 1] for i in range(50)]
    two_splits = datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "other")})
    two_splits.save_to_disk(tmp_path / "both")
    assert read(SavedDataset(str(tmp_path / "both"), split="other")) == ["other"]
    assert "train, other" in read_error(SavedDataset(str(tmp_path / "both"), split="tset"))


def test_a_torch_format_saved_with_a_dataset_does_not_turn_token_lists_into_tensors(tmp_path):
    data = datasets.Dataset.from_dict({"ids": [[1, 2], [3, 4]]}).with_format("torch")
    data.save_to_disk(tmp_path / "formatted")
    assert sorted(read(SavedDataset(str(tmp_path / "formatted"), "ids"))) == [[1, 2], [3, 4]]


def test_text_files_can_have_a_column_of_token_ids(tmp_path):
    json_lines(tmp_path / "a.jsonl", [{"ids": [1, 2]}, {"ids": [3]}])
    pyarrow.parquet.write_table(pyarrow.table({"ids": [[1, 2], [3]]}), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        assert sorted(read(TextFiles(str(tmp_path / name), column="ids"))) == [[1, 2], [3]]


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_dataset_is_read_through_datasets(folder, streaming, tmp_path, monkeypatch):
    # `datasets` reads a local folder as a dataset with one split, `train`, in the same way as a name on the Hub.
    (tmp_path / "set").mkdir()
    json_lines(tmp_path / "set" / "b.jsonl", [{"text": text} for text in TEXTS])
    corpus = HubText(str(tmp_path / "set"), streaming=streaming)
    assert sorted(read(corpus)) == sorted(TEXTS)
    assert read(corpus) == read(corpus) != read(corpus, epoch=1)
    assert "has no 'txet', it has text" in read_error(HubText(str(tmp_path / "set"), column="txet", streaming=streaming))


def write_shards(folder: Path, kind: str) -> str:
    """A dataset of five shards with 5, 6, 7, 8 and 9 documents; parquet files have row groups of 3."""
    folder.mkdir(parents=True)
    for shard in range(5):
        texts = [f"shard {shard} text {i}" for i in range(5 + shard)]
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / f"train-{shard}.parquet", row_group_size=3)
        else:
            json_lines(folder / f"train-{shard}.jsonl", [{"text": text} for text in texts])
    return str(folder)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_streamed_windows_have_every_document_once_in_shuffled_shards(tmp_path, kind):
    path = write_shards(tmp_path / "set", kind)
    # 35 documents in windows of 8: four full windows and one of 3.
    texts = read(HubText(path, shuffle_window=8), seed=1)
    assert len(texts) == len(set(texts)) == 35
    assert read(HubText(path, shuffle_window=8), seed=1) == texts != read(HubText(path, shuffle_window=8), seed=2)
    assert list(HubText(path, shuffle_window=8).reader(seed=1)) == texts
    # A window of one document shuffles nothing: shards stay in file order, and the epoch decides the order of shards.
    unshuffled = {epoch: read(HubText(path, shuffle_window=1), epoch=epoch) for epoch in (0, 1, 2)}
    orders = {epoch: list(dict.fromkeys(text.split()[1] for text in unshuffled[epoch])) for epoch in unshuffled}
    for epoch, order in orders.items():
        assert unshuffled[epoch] == [f"shard {shard} text {i}" for shard in order for i in range(5 + int(shard))]
    assert len(set(map(tuple, orders.values()))) > 1
    # Documents are shuffled inside a window only: each group of 8 has the same documents as without the shuffle.
    unshuffled = read(HubText(path, shuffle_window=1), seed=1)
    assert texts != unshuffled
    assert [set(texts[i : i + 8]) for i in range(0, 35, 8)] == [set(unshuffled[i : i + 8]) for i in range(0, 35, 8)]
    # Each window has its own order.
    assert len({tuple(unshuffled.index(text) - i for text in texts[i : i + 8]) for i in range(0, 32, 8)}) == 4


class Numbers(Corpus):
    """A corpus written by a user, without a `reader` method of its own."""

    def documents(self, *, seed=0, epoch=0):
        yield from (f"{seed} {epoch} {i}" for i in range(35))

    def description(self):
        return "numbers"


RESUMABLE = {
    "streamed parquet": lambda p: HubText(write_shards(p / "set", "parquet"), shuffle_window=8),
    "streamed jsonl": lambda p: HubText(write_shards(p / "set", "jsonl"), shuffle_window=8),
    "downloaded": lambda p: HubText(write_shards(p / "set", "parquet"), streaming=False),
    "files": lambda p: TextFiles(write_shards(p / "set", "jsonl"), shuffle_window=8),
    "saved": lambda p: SavedDataset(save_dataset(p)),
    "written by a user": lambda _: Numbers(),
}


@pytest.mark.parametrize("make", RESUMABLE.values(), ids=RESUMABLE)
def test_a_reader_resumes_from_its_state_with_the_next_document(tmp_path, make):
    corpus, order = make(tmp_path), {"seed": 3, "epoch": 1}
    all_documents = read(corpus, **order)
    reader, states = corpus.reader(**order), []
    for document in all_documents:
        states.append(json.dumps(reader.state()))
        assert next(reader) == document
    states.append(json.dumps(reader.state()))
    assert next(reader, None) is None
    assert [json.loads(state)["documents"] for state in states] == list(range(len(all_documents) + 1))
    # The start and the end; the borders of shards and of windows of 8, one before and one after; positions inside both.
    for cut in [0, 1, 3, 7, 8, 9, 14, 16, 17, 22, 24, 31, 32, 33, 34, len(all_documents)]:
        resumed = corpus.reader(**order, state=json.loads(states[cut]))
        assert json.dumps(resumed.state()) == states[cut]
        assert list(resumed) == all_documents[cut:]


def test_a_resumed_reader_can_be_saved_and_resumed_again(tmp_path):
    corpus = HubText(write_shards(tmp_path / "set", "parquet"), shuffle_window=8)
    texts, state = [], None
    while len(texts) < 35:
        reader = corpus.reader(state=state)
        texts += islice(reader, 5)
        state = reader.state()
    assert texts == read(corpus)


def test_resuming_on_a_changed_dataset_is_an_error(tmp_path):
    path = Path(write_shards(tmp_path / "set", "jsonl"))
    reader = HubText(str(path), shuffle_window=8).reader()
    assert len(list(islice(reader, 31))) == 31
    # First the number of shards changes. Then it is the old number, but each shard has one document: the window is too short.
    (path / "train-5.jsonl").write_text('{"text": "more"}')
    with pytest.raises(InputError, match="has 6 shards, it had 5 when reading began"):
        list(HubText(str(path), shuffle_window=8).reader(state=reader.state()))
    (path / "train-5.jsonl").unlink()
    for file in path.glob("*"):
        file.write_text('{"text": "less"}')
    with pytest.raises(InputError, match="has changed since reading began: 7 documents of a window were read, now it has 1"):
        list(HubText(str(path), shuffle_window=8).reader(state=reader.state()))


def test_numbers_out_of_range_are_refused():
    for name, value in (("shuffle_window", 0), ("retries", -1), ("retry_seconds", -0.5)):
        with pytest.raises(InputError, match=f"^{name} must be at least [01], got {value}$"):
            HubText("org/name", **{name: value})


def test_an_unreachable_hub_is_an_error_of_one_line(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "the dataset 'no-such/dataset' cannot be read" in read_error(HubText("no-such/dataset"))


def test_python_docs_reads_docstrings_of_installed_packages_from_a_minimum_length_on():
    texts = list(islice(PythonDocs(min_characters=300).documents(), 300))
    assert min(map(len, texts)) >= 300
    # The control: there are shorter docstrings, which the minimum leaves out.
    assert min(map(len, islice(PythonDocs(min_characters=1).documents(), 300))) < 300


def test_files_with_docstrings_are_parsed_without_warnings_and_never_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    marker = tmp_path / "imported"
    method = '    async def f(self):\n        """Method.\n\n        Indented.\n        """\n'
    (tmp_path / "good.py").write_text(f'"""Module."""\nopen({str(marker)!r}, "w")\nclass A:\n    """Class."""\n{method}')
    (tmp_path / "template.py").write_text("def {{ name }}(:")
    (tmp_path / "null.py").write_bytes(b'"""x"""\0')
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    (tmp_path / "deep.py").write_text("x = " + "(" * 1000 + ")" * 1000)
    (tmp_path / "warns.py").write_text('"""Warns."""\nx = "\\d"\nassert (1, 2)\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        texts = read(PythonDocs(min_characters=1))
    assert sorted(texts) == ["Class.", "Method.\n\nIndented.", "Module.", "Warns."]
    assert not marker.exists()


def test_an_environment_without_packages_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "no package is installed" in read_error(PythonDocs())


def test_unreadable_paths_and_files_are_errors_of_one_line(folder, tmp_path):
    assert "does not exist" in read_error(TextFiles(str(folder / "z.txt")))
    assert "a.txt" in read_error(TextFiles(str(folder / "aa.txt")))  # the most similar path is suggested
    assert "does not exist" in read_error(TextFiles(str(folder / "*.nothing")))
    assert "is none of .txt" in read_error(TextFiles(str(folder / "notes.md")))
    (folder / "empty").mkdir()
    assert "holds no .txt" in read_error(TextFiles(str(folder / "empty")))
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "binary.txt' cannot be read" in read_error(TextFiles(str(folder / "binary.txt")))
    (folder / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}' * 1000)[:-20])
    assert "broken.jsonl.gz' cannot be read" in read_error(TextFiles(str(folder / "broken.jsonl.gz")))
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    assert "broken.parquet' is not a parquet file" in read_error(TextFiles(str(folder / "broken.parquet")))
    assert "save_to_disk" in read_error(SavedDataset(str(folder)))
    assert "save_to_disk" in read_error(SavedDataset(str(folder / "nowhere")))


def test_the_error_about_a_broken_json_line_names_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n{"text": "c"}')
    line = read_error(TextFiles(str(tmp_path / "a.jsonl")))
    assert "a.jsonl' line 3 is not JSON" in line
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n["b"]')
    assert "line 2 must be an object with 'text', it is list" in read_error(TextFiles(str(tmp_path / "b.jsonl")))


def test_the_error_about_a_missing_column_lists_the_columns_the_most_similar_first(tmp_path):
    json_lines(tmp_path / "a.jsonl", [{"id": 1, "content": "a", "url": "b"}])
    assert "line 1 has no 'contents', it has content, id, url" in read_error(TextFiles(str(tmp_path / "a.jsonl"), column="contents"))
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "content": ["a"]}), tmp_path / "a.parquet")
    assert "has no 'contents', it has content, id" in read_error(TextFiles(str(tmp_path / "a.parquet"), column="contents"))
    assert "has no 'txt', it has text, ids" in read_error(SavedDataset(save_dataset(tmp_path), "txt"))


def test_a_column_of_neither_text_nor_token_lists_is_an_error(tmp_path):
    json_lines(tmp_path / "a.jsonl", [{"text": 3.5}])
    assert "must be text or a list of token ids, it is float" in read_error(TextFiles(str(tmp_path / "a.jsonl")))
    json_lines(tmp_path / "b.jsonl", [{"text": None}])
    assert "it is NoneType" in read_error(TextFiles(str(tmp_path / "b.jsonl")))


def test_splits_are_stable_and_of_the_requested_sizes():
    # Pinned: another hash would move documents from the training split of existing runs to their test split.
    assert [split_of(f"text number {i}", 0.2) for i in range(8)] == PINNED
    assert split_of([1, 2, 3], 0.3) == split_of([1, 2, 3], 0.3)
    counts = Counter(split_of(str(i), 0.02) for i in range(20_000))
    # Binomial(20000, 0.02): 400 with a standard deviation of 20.
    assert abs(counts["validation"] - 400) < 80
    assert abs(counts["test"] - 400) < 80


def test_a_larger_held_out_fraction_keeps_validation_documents_in_validation():
    for text in TEXTS:
        if split_of(text, 0.1) == "validation":
            assert split_of(text, 0.2) == "validation"


def test_in_memory_reads_each_document_once_in_an_order_set_by_seed_and_epoch():
    texts = [f"text {i}" for i in range(20)]
    corpus = InMemory(texts, "mine")
    first = list(corpus.documents(seed=1))
    assert sorted(first) == sorted(texts) and first == list(corpus.documents(seed=1)) and texts == [f"text {i}" for i in range(20)]
    assert first != list(corpus.documents(seed=2)) and first != list(corpus.documents(seed=1, epoch=1))
    assert corpus.description() == "mine" and corpus.settings() == {}


NESTED = '''
"""module"""
def f(a=lambda: 1):
    """f"""
    if a:
        class Inside:
            """inside"""
            async def g(self):
                """g"""
    else:
        def h():
            """h"""
    try:
        pass
    except ValueError:
        def in_handler():
            """handler"""
    finally:
        def at_last():
            """last"""
    match a:
        case 1:
            def in_case():
                """case"""
    return "no docstring"
'''


def test_docstrings_are_the_same_as_those_found_by_ast_walk(tmp_path):
    (tmp_path / "nested.py").write_text(NESTED)
    (tmp_path / "single.py").write_text("'quoted once'\n")
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    expected = [ast.get_docstring(node) for node in ast.walk(ast.parse(NESTED)) if isinstance(node, kinds)]
    assert list(_docstrings(tmp_path / "nested.py")) == expected and len(expected) == 8
    assert list(_docstrings(tmp_path / "single.py")) == []


@pytest.mark.parametrize(
    ("documents", "held_out", "says"),
    [
        ([], 0.05, "corpus: there is no text in the notes"),
        ([" ", "\n\t", []], 0.0, "corpus: there is no text in the notes"),
        (["one giant line " * 1000], 0.05, "corpus: all text of the notes is one document, and documents are held out whole"),
        (["the same"] * 2000, 0.05, "corpus: all text of the notes is 2,000 equal documents, and documents are held out whole"),
        ([[1, 2]] * 3, 0.05, "corpus: all text of the notes is 3 equal documents"),
        ([f"text {i}" for i in range(50)], 1e-9, "too small to validate on: of 50 different documents none is held out"),
        ([f"text {i}" for i in range(3)], 0.49, "corpus: the notes has 3 different documents: too few to train on"),
    ],
)
def test_an_error_about_held_out_text_says_what_the_text_lacks(documents, held_out, says):
    with pytest.raises(InputError, match=re.escape(says)):
        check_held_out(InMemory(documents, "the notes"), held_out, seed=0, ranks=2, stall_seconds=10)


def test_one_document_is_enough_where_nothing_is_held_out():
    corpus = InMemory(["text"])
    assert check_held_out(corpus, 0.0, seed=0, ranks=1, stall_seconds=10) is None
    with pytest.raises(InputError, match="is one document"):
        check_held_out(corpus, 0.05, seed=0, ranks=1, stall_seconds=10)

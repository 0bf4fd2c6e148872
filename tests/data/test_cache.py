"""Activation caches: same batches as the model, interchange with SAELens, resumed writes, damaged caches, caches of other settings."""

import json
import pickle
import random
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.training.activations_store import ActivationsStore

from metasae_lightning.cli import main
from metasae_lightning.corpora import TextFiles
from metasae_lightning.data import ActivationsDataModule
from metasae_lightning.data.batching import StreamSlice
from metasae_lightning.data.cached_stream import CachedStream
from metasae_lightning.errors import InputError
from metasae_lightning.lm import HuggingFaceLM
from tests.helpers.checkpoints import RunsCode
from tests.helpers.command_line import CommandLine
from tests.helpers.models import save_model

HOOK = "blocks.1.hook_resid_post"
ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    **{"tokens": 1600, "batch_size": 16, "context_size": 12, "buffer_size": 100, "forward_batch": 3, "held_out": 0.2},
    **{"validation_tokens": 64, "test_tokens": 64},
}


# Pseudo-random digits: activations late in a context differ between documents, so that equal rows come from the same token.
TEXTS = [" ".join(str(random.Random(i).getrandbits(900))[j : j + 7] for j in range(0, 110 + i % 150, 7)) for i in range(200)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    save_model(root / "tiny", "llama", layers=3)
    (root / "text.txt").write_text("\n\n".join(TEXTS))
    return root


def data(
    inputs: Path, cache: Path | None = None, hook: Any = HOOK, model_kwargs: Any = None, column: str = "text", **changes: Any
) -> ActivationsDataModule:
    model = HuggingFaceLM(str(inputs / "tiny"), hook, device="cpu", model_kwargs=model_kwargs)
    corpus = TextFiles(str(inputs / "text.txt"), column=column)
    return ActivationsDataModule(model, corpus, cache=None if cache is None else str(cache), **{**SIZES, **changes})


def batches_of(module: ActivationsDataModule, split: str = "train") -> list[torch.Tensor]:
    module.setup()
    return [batch.activations for batch in module.stream(split, getattr(module, f"{split}_tokens" if split != "train" else "tokens"))]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cache(inputs: Path) -> Path:
    data(inputs, inputs / "written").write_cache(shard_gib=2e-5)
    return inputs / "written"


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_cached_batches_equal_those_of_the_model_without_loading_it(inputs: Path, cache: Path, split: str, monkeypatch: pytest.MonkeyPatch):
    model_batches = batches_of(data(inputs), split)
    monkeypatch.setattr(HuggingFaceLM, "load", lambda self: pytest.fail("the model was loaded"))
    assert same(batches_of(data(inputs, cache), split), model_batches)
    assert len(json.loads((cache / "cache.json").read_text())["shards"]["train"]) > 3


def test_options_applied_after_the_forward_pass_may_differ_from_the_cache(inputs: Path, cache: Path):
    changes: dict[str, Any] = {"batch_size": 32, "buffer_size": 64, "skip_positions": 3, "tokens": 640, "buffer_dtype": "bfloat16"}
    assert same(batches_of(data(inputs, cache, **changes)), batches_of(data(inputs, **changes)))


def test_a_cached_stream_resumes_and_splits_over_ranks_without_overlap(inputs: Path, cache: Path):
    def cached_stream(rank: int = 0, world_size: int = 1, tokens: int = 640) -> Any:
        module = data(inputs, cache, skip_positions=6)
        module.setup()
        single: Any = module.stream("train", tokens)
        stream_slice = StreamSlice("train", tokens // world_size, rank, world_size)
        return CachedStream(single.cache, single.batching, stream_slice, special=single.special)

    expected = [batch.activations for batch in cached_stream()]
    interrupted, restored = cached_stream(), cached_stream()
    for _, _ in zip(range(17), interrupted, strict=False):
        pass
    state = interrupted.state_dict()
    restored.load_state_dict(state)
    assert state["batches"] == 17 and same([batch.activations for batch in restored], expected[17:])
    rows_of_rank = [{row.numpy().tobytes() for batch in cached_stream(rank, 2) for row in batch.activations} for rank in range(2)]
    assert len(rows_of_rank[0]) > 200 and not rows_of_rank[0] & rows_of_rank[1]
    on_two = cached_stream(1, 2, tokens=448)
    on_two.load_other_world_size([state])
    remaining_rows = {row.numpy().tobytes() for batch in on_two for row in batch.activations}
    assert len(remaining_rows) > 90 and not remaining_rows & {row.numpy().tobytes() for batch in expected[:17] for row in batch}


def test_an_exhausted_cache_starts_over_in_another_order_or_ends(inputs: Path, cache: Path):
    several_epochs = batches_of(data(inputs, cache, tokens=6400))
    assert len(several_epochs) == 400
    assert not same(several_epochs[:50], several_epochs[100:150])
    assert 95 <= len(batches_of(data(inputs, cache, tokens=6400, exhausted="end"))) <= 110


def test_saelens_activations_store_reads_a_written_cache(inputs: Path, cache: Path):
    dataset = datasets.load_from_disk(str(cache / "train"))
    assert dataset.column_names == [HOOK, "token_ids"]
    model = HuggingFaceLM(str(inputs / "tiny"), HOOK, device="cpu")
    model.load()
    store = ActivationsStore(
        model=model._root,  # type: ignore[arg-type]
        dataset=None, cached_activations_path=str(cache / "train"), streaming=False, hook_name=HOOK, hook_head_index=None,
        context_size=12, d_in=32, n_batches_in_buffer=4, total_training_tokens=1000, store_batch_size_prompts=4,
        train_batch_size_tokens=16, prepend_bos=True, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    rows, tokens = store.get_raw_llm_batch()
    assert tokens is not None and rows.shape == (48, 32)
    module = data(inputs)
    module.setup()
    first_contexts, _ = module.stream("train", 1600).row_reader().next_pass()  # type: ignore[attr-defined]
    assert torch.equal(tokens.view(4, 12)[:3].long(), first_contexts)
    assert torch.equal(rows.view(4, 12, 32)[:3], module.stream("train", 1600).row_reader().forward(first_contexts))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def saelens_cache(inputs: Path) -> Path:
    """A cache that SAELens's own runner wrote."""
    texts = datasets.Dataset.from_dict({"text": TEXTS})
    texts.save_to_disk(str(inputs / "texts"))
    cfg = CacheActivationsRunnerConfig(
        dataset_path=str(inputs / "texts"), model_name=str(inputs / "tiny"), model_class_name="AutoModelForCausalLM", model_batch_size=4,
        hook_name="model.layers.1", d_in=32, training_tokens=1200, context_size=12, new_cached_activations_path=str(inputs / "theirs"),
        shuffle=False, device="cpu", streaming=False, buffer_size_gb=0.00005,
    )  # fmt: skip
    CacheActivationsRunner(cfg, override_dataset=texts).run()
    return inputs / "theirs"


@pytest.mark.filterwarnings("ignore")
def test_a_cache_written_by_saelens_is_read_with_special_tokens_left_out(inputs: Path, saelens_cache: Path):
    module = data(
        inputs,
        saelens_cache,
        hook="model.layers.1",
        tokens=320,
        held_out=0.1,
        validation_tokens=16,
        test_tokens=16,
        skip_positions=6,
    )
    train, validation = batches_of(module), batches_of(module, "validation")
    stored = datasets.load_from_disk(str(saelens_cache)).with_format("torch")
    rows = {row.numpy().tobytes() for context in stored["model.layers.1"] for row in context}
    special = set(module.language_model.tokenizer.all_special_ids if module.language_model._root else [0, 1])
    token_by_row = {
        row.numpy().tobytes(): int(token)
        for context, ids in zip(stored["model.layers.1"], stored["token_ids"], strict=True)
        for row, token in zip(context, ids, strict=True)
    }
    for row in torch.cat([*train, *validation]):
        assert row.numpy().tobytes() in rows and token_by_row[row.numpy().tobytes()] not in special
    assert not {row.numpy().tobytes() for row in torch.cat(train)} & {row.numpy().tobytes() for row in torch.cat(validation)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_size": 10}, "context_size: 12 there, 10 here"),
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"cross_document_attention": True}, "cross_document_attention: False there"),
        ({"model_kwargs": {"revision": "step1000"}}, "model_kwargs: {} there, {'revision': 'step1000'} here"),
        ({"column": "title"}, "column: text there, title here"),
        ({"hook": "blocks.0.hook_resid_post"}, "holds no activations of 'blocks.0.hook_resid_post', it holds blocks.1"),
    ],
)
def test_a_cache_of_other_settings_is_refused(inputs: Path, cache: Path, change: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        data(inputs, cache, **change).setup()


# The cache was written with a setting that the run does not have.
def test_a_cache_of_another_model_revision_is_refused_by_a_run_without_revision(inputs: Path, cache: Path, tmp_path: Path):
    record = json.loads((cache / "cache.json").read_text())
    record["identity"]["model_kwargs"] = {"revision": "step1000"}
    shutil.copytree(cache, tmp_path / "other")
    (tmp_path / "other" / "cache.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=re.escape("model_kwargs: {'revision': 'step1000'} there, {} here")):
        data(inputs, tmp_path / "other").setup()


def test_a_cache_of_another_model_or_tokenizer_is_refused(inputs: Path, cache: Path, tmp_path: Path):
    other_model = data(inputs, cache)
    other_model.language_model.name = str(save_model(tmp_path / "other", "llama", layers=3))
    with pytest.raises(InputError, match=r"model: .*tiny there, .*other here"):
        other_model.setup()
    record = json.loads((cache / "cache.json").read_text())
    other_tokenizer = data(inputs, cache)
    other_tokenizer.language_model.load_tokenizer().add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(InputError, match=f"tokenizer: {record['identity']['tokenizer']} there"):
        other_tokenizer.setup()


def test_the_error_names_a_truncated_shard(inputs: Path, tmp_path: Path):
    data(inputs, tmp_path / "cut", tokens=400).write_cache(shard_gib=2e-5)
    shard = sorted((tmp_path / "cut" / "train").glob("data-*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    reader = data(inputs, tmp_path / "cut", tokens=400)
    with pytest.raises(InputError, match=f"the shard .*{shard.name} is damaged, .* bytes of"):
        reader.setup()


def test_writing_activations_above_the_float16_range_is_refused(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    activations = HuggingFaceLM.activations
    monkeypatch.setattr(HuggingFaceLM, "activations", lambda self, *args: activations(self, *args) * 1e6)
    with pytest.raises(InputError, match=r"store: float16 ends at 65504 and an activation of blocks.1"):
        data(inputs, tmp_path / "half").write_cache(dtype="float16")
    assert not list((tmp_path / "half").rglob("*.arrow"))


@pytest.mark.filterwarnings("ignore:held_out. 0 holds nothing out")
def test_without_held_out_documents_only_the_train_split_is_cached(inputs: Path, tmp_path: Path):
    data(inputs, tmp_path / "train", held_out=0.0).write_cache()
    assert [path.name for path in (tmp_path / "train").iterdir() if path.is_dir()] == ["train"]
    assert same(batches_of(data(inputs, tmp_path / "train", held_out=0.0)), batches_of(data(inputs, held_out=0.0)))


def test_a_missing_and_an_unfinished_cache_are_refused(inputs: Path, tmp_path: Path):
    with pytest.raises(InputError, match="is no folder; metasae cache writes one"):
        data(inputs, tmp_path / "nowhere").setup()
    (tmp_path / "begun" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="is not finished: run metasae cache again"):
        data(inputs, tmp_path / "begun").setup()


@pytest.mark.parametrize("kind", ["pickle", "torch", "damaged", "another object"])
def test_a_crafted_progress_file_is_refused(inputs: Path, tmp_path: Path, kind: str):
    progress, hostile = tmp_path / "cache" / "train" / ".progress", RunsCode(tmp_path / "made")
    progress.parent.mkdir(parents=True)
    progress.write_bytes(pickle.dumps(({}, {}, hostile)) if kind == "pickle" else b"damaged")
    if kind in ("torch", "another object"):
        with progress.open("wb") as file:
            torch.save(({}, {}, hostile) if kind == "torch" else 1, file)
    with pytest.raises(InputError, match=r"train/\.progress was refused, and nothing in it was run.*; remove \S+/cache/train and"):
        data(inputs, tmp_path / "cache").write_cache()
    assert not (tmp_path / "made").exists()


def recipe(inputs: Path, folder: Path) -> Path:
    config = {**yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text()), "arms": None}
    lm = {
        "class_path": "metasae_lightning.lm.HuggingFaceLM",
        "init_args": {"name": str(inputs / "tiny"), "hook": HOOK, "device": "cpu"},
    }
    corpus = {"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(inputs / "text.txt")}}
    config["data"]["init_args"] = {"language_model": lm, "corpus": corpus, **SIZES, "cache": str(folder)}
    for role, size in (("primary", 64), ("meta", 16)):
        config["model"]["init_args"][role]["init_args"] |= {"d_in": 32, "d_sae": size, "k": 4}
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(config))
    return folder.parent / "recipe.yaml"


def test_a_killed_cache_command_resumes_behind_its_last_shard_and_writes_equal_files(inputs: Path, cache: Path, tmp_path: Path):
    config, folder = recipe(inputs, tmp_path / "killed"), tmp_path / "killed"
    words = ["cache", "-c", str(config), "--shard_gib", "2e-5"]
    process = CommandLine(words, cwd=ROOT)
    deadline = time.monotonic() + 120
    while len(list(folder.glob("train/data-*.arrow"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    modified_at = {path.name: path.stat().st_mtime_ns for path in folder.glob("train/data-*.arrow")}
    assert modified_at and not (folder / "cache.json").exists()
    (folder / "train" / "..progress.123456").write_bytes(b"the draft of a killed process")
    assert main(words) == 0
    # The kill may fall between renaming a shard and recording it, so at most one shard is written again.
    rewritten = [name for name, time_ns in modified_at.items() if (folder / "train" / name).stat().st_mtime_ns != time_ns]
    assert len(rewritten) <= 1 and len(modified_at) >= 2
    for split in ("train", "validation", "test"):
        for shard in (cache / split).glob("data-*.arrow"):
            assert (folder / split / shard.name).read_bytes() == shard.read_bytes()
    assert not [*folder.rglob(".*"), *folder.rglob("*.draft")]


def test_a_run_from_a_cache_has_the_results_of_a_run_from_the_model(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = recipe(inputs, tmp_path / "cached")
    assert main(["cache", "-c", str(config)]) == 0
    assert main(["cache", "-c", str(config)]) == 2
    assert "is there and whole" in capsys.readouterr().err
    for name, options in (("from_cache", []), ("from_model", ["--data.init_args.cache", "null"])):
        assert main(["fit", "-c", str(config), "--run", str(tmp_path / name), *options]) == 0
    from_cache, from_model = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["validation"] for name in ("from_cache", "from_model")
    )
    assert from_cache["primary"] == from_model["primary"]
    assert [from_cache["exported"][role]["fvu"] for role in ("primary", "meta")] == [
        from_model["exported"][role]["fvu"] for role in ("primary", "meta")
    ]
    cfg = json.loads((tmp_path / "from_cache" / "saes" / "primary" / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == HOOK

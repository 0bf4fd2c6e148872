"""Activations on disk: ours read by SAELens, SAELens's read here, stopped and gone on with, damaged, of something else."""

import json
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
from tests.helpers.command_line import CommandLine
from tests.helpers.models import save_model

HOOK = "blocks.1.hook_resid_post"
ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    **{"tokens": 1600, "batch_size": 16, "context_size": 12, "buffer_size": 100, "forward_batch": 3, "held_out": 0.2},
    **{"validation_tokens": 64, "test_tokens": 64},
}


# Digits as good as random: no row deep in a context is like one of another document.
TEXTS = [" ".join(str(random.Random(i).getrandbits(900))[j : j + 7] for j in range(0, 110 + i % 150, 7)) for i in range(200)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    save_model(root / "tiny", "llama", layers=3)
    (root / "text.txt").write_text("\n\n".join(TEXTS))
    return root


def data(
    place: Path, cache: Path | None = None, hook: Any = HOOK, model_kwargs: Any = None, column: str = "text", **changes: Any
) -> ActivationsDataModule:
    model = HuggingFaceLM(str(place / "tiny"), hook, device="cpu", model_kwargs=model_kwargs)
    corpus = TextFiles(str(place / "text.txt"), column=column)
    return ActivationsDataModule(model, corpus, cache=None if cache is None else str(cache), **{**SIZES, **changes})


def given(module: ActivationsDataModule, split: str = "train") -> list[torch.Tensor]:
    module.setup()
    return [batch.activations for batch in module.stream(split, getattr(module, f"{split}_tokens" if split != "train" else "tokens"))]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cache(place: Path) -> Path:
    data(place, place / "whole").write_cache(shard_gib=2e-5)
    return place / "whole"


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_run_from_its_cache_sees_the_batches_of_the_run(place: Path, cache: Path, split: str, monkeypatch: pytest.MonkeyPatch):
    live = given(data(place), split)
    monkeypatch.setattr(HuggingFaceLM, "load", lambda self: pytest.fail("the model was loaded"))
    assert same(given(data(place, cache), split), live)
    assert len(json.loads((cache / "cache.json").read_text())["shards"]["train"]) > 3


def test_what_comes_after_the_model_may_differ_from_the_cache(place: Path, cache: Path):
    change: dict[str, Any] = {"batch_size": 32, "buffer_size": 64, "skip_positions": 3, "tokens": 640, "buffer_dtype": "bfloat16"}
    assert same(given(data(place, cache, **change)), given(data(place, **change)))


def test_a_cached_stream_is_restored_and_divided(place: Path, cache: Path):
    def stream(rank: int = 0, world: int = 1, tokens: int = 640) -> Any:
        module = data(place, cache, skip_positions=6)
        module.setup()
        whole: Any = module.stream("train", tokens)
        return CachedStream(whole.cache, whole.batching, StreamSlice("train", tokens // world, rank, world), special=whole.special)

    whole = [batch.activations for batch in stream()]
    early, late = stream(), stream()
    for _, _ in zip(range(17), early, strict=False):
        pass
    state = early.state_dict()
    late.load_state_dict(state)
    assert state["batches"] == 17 and same([batch.activations for batch in late], whole[17:])
    parts = [{row.numpy().tobytes() for batch in stream(rank, 2) for row in batch.activations} for rank in range(2)]
    assert len(parts[0]) > 200 and not parts[0] & parts[1]
    on_two = stream(1, 2, tokens=448)
    on_two.load_other_world_size([state])
    rest = {row.numpy().tobytes() for batch in on_two for row in batch.activations}
    assert len(rest) > 90 and not rest & {row.numpy().tobytes() for batch in whole[:17] for row in batch}


def test_an_exhausted_cache_begins_again_in_another_order_or_ends(place: Path, cache: Path):
    many = given(data(place, cache, tokens=6400))
    assert len(many) == 400
    assert not same(many[:50], many[100:150])
    assert 95 <= len(given(data(place, cache, tokens=6400, exhausted="end"))) <= 110


def test_saelens_reads_what_was_written(place: Path, cache: Path):
    read = datasets.load_from_disk(str(cache / "train"))
    assert read.column_names == [HOOK, "token_ids"]
    model = HuggingFaceLM(str(place / "tiny"), HOOK, device="cpu")
    model.load()
    store = ActivationsStore(
        model=model._root,  # type: ignore[arg-type]
        dataset=None, cached_activations_path=str(cache / "train"), streaming=False, hook_name=HOOK, hook_head_index=None,
        context_size=12, d_in=32, n_batches_in_buffer=4, total_training_tokens=1000, store_batch_size_prompts=4,
        train_batch_size_tokens=16, prepend_bos=True, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip
    rows, tokens = store.get_raw_llm_batch()
    assert tokens is not None and rows.shape == (48, 32)
    module = data(place)
    module.setup()
    first, _ = module.stream("train", 1600).row_reader().next_pass()  # type: ignore[attr-defined]
    assert torch.equal(tokens.view(4, 12)[:3].long(), first)
    assert torch.equal(rows.view(4, 12, 32)[:3], module.stream("train", 1600).row_reader().forward(first))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def theirs(place: Path) -> Path:
    """A cache that SAELens's own runner wrote."""
    texts = datasets.Dataset.from_dict({"text": TEXTS})
    texts.save_to_disk(str(place / "texts"))
    cfg = CacheActivationsRunnerConfig(
        dataset_path=str(place / "texts"), model_name=str(place / "tiny"), model_class_name="AutoModelForCausalLM", model_batch_size=4,
        hook_name="model.layers.1", d_in=32, training_tokens=1200, context_size=12, new_cached_activations_path=str(place / "theirs"),
        shuffle=False, device="cpu", streaming=False, buffer_size_gb=0.00005,
    )  # fmt: skip
    CacheActivationsRunner(cfg, override_dataset=texts).run()
    return place / "theirs"


@pytest.mark.filterwarnings("ignore")
def test_saelens_caches_are_read_as_they_are(place: Path, theirs: Path):
    module = data(place, theirs, hook="model.layers.1", tokens=320, held_out=0.1, validation_tokens=16, test_tokens=16, skip_positions=6)
    train, validation = given(module), given(module, "validation")
    stored = datasets.load_from_disk(str(theirs)).with_format("torch")
    rows = {row.numpy().tobytes() for context in stored["model.layers.1"] for row in context}
    special = set(module.language_model.tokenizer.all_special_ids if module.language_model._root else [0, 1])
    kinds = {
        row.numpy().tobytes(): int(token)
        for context, ids in zip(stored["model.layers.1"], stored["token_ids"], strict=True)
        for row, token in zip(context, ids, strict=True)
    }
    for row in torch.cat([*train, *validation]):
        assert row.numpy().tobytes() in rows and kinds[row.numpy().tobytes()] not in special
    assert not {r.numpy().tobytes() for r in torch.cat(train)} & {r.numpy().tobytes() for r in torch.cat(validation)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"context_size": 10}, "context_size: 12 there, 10 here"),
        ({"seed": 3}, "seed: 0 there, 3 here"),
        ({"cross_document_attention": True}, "cross_document_attention: False there"),
        ({"model_kwargs": {"revision": "step1000"}}, "model_kwargs: {} there, {'revision': 'step1000'} here"),
        ({"column": "title"}, "column: text there, title here"),
        ({"hook": "blocks.0.hook_resid_post"}, "holds no activations of 'blocks.0.hook_resid_post', it holds blocks.1"),
    ],
)
def test_a_cache_of_something_else_is_refused(place: Path, cache: Path, change: dict[str, Any], says: str):
    with pytest.raises(InputError, match=says):
        data(place, cache, **change).setup()


# The other way round: what the cache was made with, and the run says nothing of.
def test_a_cache_of_a_models_other_revision_is_refused_by_a_run_without_one(place: Path, cache: Path, tmp_path: Path):
    record = json.loads((cache / "cache.json").read_text())
    record["identity"]["model_kwargs"] = {"revision": "step1000"}
    shutil.copytree(cache, tmp_path / "other")
    (tmp_path / "other" / "cache.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=re.escape("model_kwargs: {'revision': 'step1000'} there, {} here")):
        data(place, tmp_path / "other").setup()


def test_another_model_or_tokenizer_is_refused(place: Path, cache: Path, tmp_path: Path):
    other = data(place, cache)
    other.language_model.name = str(save_model(tmp_path / "other", "llama", layers=3))
    with pytest.raises(InputError, match=r"model: .*tiny there, .*other here"):
        other.setup()
    record = json.loads((cache / "cache.json").read_text())
    same_name = data(place, cache)
    same_name.language_model.load_tokenizer().add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(InputError, match=f"tokenizer: {record['identity']['tokenizer']} there"):
        same_name.setup()


def test_a_truncated_shard_is_named(place: Path, tmp_path: Path):
    data(place, tmp_path / "cut", tokens=400).write_cache(shard_gib=2e-5)
    shard = sorted((tmp_path / "cut" / "train").glob("data-*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    reader = data(place, tmp_path / "cut", tokens=400)
    with pytest.raises(InputError, match=f"the shard .*{shard.name} is damaged, .* bytes of"):
        reader.setup()


def test_what_float16_cannot_hold_is_not_stored(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = HuggingFaceLM.activations
    monkeypatch.setattr(HuggingFaceLM, "activations", lambda self, *given: plain(self, *given) * 1e6)
    with pytest.raises(InputError, match=r"store: float16 ends at 65504 and an activation of blocks.1"):
        data(place, tmp_path / "half").write_cache(dtype="float16")
    assert not list((tmp_path / "half").rglob("*.arrow"))


@pytest.mark.filterwarnings("ignore:held_out. 0 holds nothing out")
def test_where_nothing_is_held_out_only_training_is_cached(place: Path, tmp_path: Path):
    data(place, tmp_path / "train", held_out=0.0).write_cache()
    assert [path.name for path in (tmp_path / "train").iterdir() if path.is_dir()] == ["train"]
    assert same(given(data(place, tmp_path / "train", held_out=0.0)), given(data(place, held_out=0.0)))


def test_no_folder_and_an_unfinished_one_are_told(place: Path, tmp_path: Path):
    with pytest.raises(InputError, match="is no folder; metasae cache writes one"):
        data(place, tmp_path / "nowhere").setup()
    (tmp_path / "begun" / "train").mkdir(parents=True)
    with pytest.raises(InputError, match="is not finished: run metasae cache again"):
        data(place, tmp_path / "begun").setup()


def recipe(place: Path, folder: Path) -> Path:
    written = {**yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text()), "arms": None}
    lm = {"class_path": "metasae_lightning.lm.HuggingFaceLM", "init_args": {"name": str(place / "tiny"), "hook": HOOK, "device": "cpu"}}
    corpus = {"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(place / "text.txt")}}
    written["data"]["init_args"] = {"language_model": lm, "corpus": corpus, **SIZES, "cache": str(folder)}
    for role, size in (("primary", 64), ("meta", 16)):
        written["model"]["init_args"][role]["init_args"] |= {"d_in": 32, "d_sae": size, "k": 4}
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(written))
    return folder.parent / "recipe.yaml"


def test_killed_half_way_it_goes_on_behind_its_last_shard(place: Path, cache: Path, tmp_path: Path):
    config, folder = recipe(place, tmp_path / "killed"), tmp_path / "killed"
    words = ["cache", "-c", str(config), "--shard_gib", "2e-5"]
    process = CommandLine(words, cwd=ROOT)
    until = time.monotonic() + 120
    while len(list(folder.glob("train/data-*.arrow"))) < 2 and time.monotonic() < until:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("train/data-*.arrow")}
    assert kept and not (folder / "cache.json").exists()
    assert main(words) == 0
    # One shard may have been renamed and not yet recorded: only that one is written again.
    again = [name for name, when in kept.items() if (folder / "train" / name).stat().st_mtime_ns != when]
    assert len(again) <= 1 and len(kept) >= 2
    for split in ("train", "validation", "test"):
        for shard in (cache / split).glob("data-*.arrow"):
            assert (folder / split / shard.name).read_bytes() == shard.read_bytes()
    assert not [*folder.rglob(".*"), *folder.rglob("*.draft")]


def test_training_from_a_cache_by_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = recipe(place, tmp_path / "cached")
    assert main(["cache", "-c", str(config)]) == 0
    assert main(["cache", "-c", str(config)]) == 2
    assert "is there and whole" in capsys.readouterr().err
    for name, more in (("from_cache", []), ("from_model", ["--data.init_args.cache", "null"])):
        assert main(["fit", "-c", str(config), "--run", str(tmp_path / name), *more]) == 0
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text())["validation"] for name in ("from_cache", "from_model"))
    assert one["primary"] == two["primary"]
    assert [one["exported"][role]["fvu"] for role in ("primary", "meta")] == [two["exported"][role]["fvu"] for role in ("primary", "meta")]
    cfg = json.loads((tmp_path / "from_cache" / "saes" / "primary" / "cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == HOOK

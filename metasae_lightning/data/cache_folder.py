"""Activations on disk, in the format that SAELens's CacheActivationsRunner writes and its ActivationsStore reads."""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from metasae_lightning.atomic_files import write_bytes
from metasae_lightning.corpora.base import Split
from metasae_lightning.corpora.tokenization import special_ids
from metasae_lightning.errors import InputError

CACHED = ("context_size", "prepend_bos", "held_out", "seed", "cross_document_attention")
"""The fields of `Batching` that stored activations depend on; the other fields apply to activations after the model."""
TOKENS, RECORD, PROGRESS = "token_ids", "cache.json", ".progress"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


def fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and special tokens."""
    text = json.dumps([sorted(tokenizer.get_vocab().items()), special_ids(tokenizer)])
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Folder:
    """One memory-mapped dataset folder, with a row for each context and a column for each hook."""

    def __init__(self, path: Path, hooks: list[str], shards: Mapping[str, int] | None = None):
        self.path, self.hooks = path, hooks
        names = [entry["filename"] for entry in _json(path / "state.json")["_data_files"]]
        check_sizes(path, shards or {})
        tables = [_mapped(path / name) for name in names]
        columns = tables[0].column_names
        for hook in hooks:
            if hook not in columns:
                raise InputError(f"cache: {path} holds no activations of {hook!r}, it holds {', '.join(c for c in columns if c != TOKENS)}")
        shapes = {hook: tables[0].schema.field(hook).type.shape for hook in hooks}
        self.context_size: int = next(iter(shapes.values()))[0]
        self.widths: dict[str, int] = {hook: shape[1] for hook, shape in shapes.items()}
        batches = [batch for table in tables for batch in table.to_batches()]
        self._begins = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._parts = {hook: [_view(batch.column(hook), shapes[hook]) for batch in batches] for hook in hooks}
        self._tokens = [_flat(batch.column(TOKENS)).reshape(-1, self.context_size) for batch in batches] if TOKENS in columns else None

    def __len__(self) -> int:
        """Number of contexts."""
        return int(self._begins[-1])

    def tokens(self) -> Int[Tensor, "context position"] | None:
        """The tokens of every context, or None where the folder does not contain them."""
        return None if self._tokens is None else torch.from_numpy(np.concatenate(self._tokens)).long()

    def rows(self, indices: Int[Tensor, " row"]) -> Float[Tensor, "row d_model"]:
        """Float32 activations at row indices, `context * context_size + position` each, with the hooks concatenated."""
        contexts, positions = np.divmod(indices.numpy(), self.context_size)
        parts = np.searchsorted(self._begins, contexts, side="right") - 1
        out = np.empty((len(indices), sum(self.widths.values())), dtype=np.float32)
        for part in np.unique(parts):
            in_part = parts == part
            local = contexts[in_part] - self._begins[part]
            out[in_part] = np.concatenate([self._parts[hook][part][local, positions[in_part]] for hook in self.hooks], axis=1)
        return torch.from_numpy(out)


class ActivationCache:
    """An activation cache: that of `metasae cache`, with a folder for each split and a record of its settings, or a folder of SAELens."""

    def __init__(self, path: str):
        self.path = Path(path).expanduser()
        self.record: dict[str, Any] = {}
        self.widths: dict[str, int] = {}
        self._hooks: list[str] = []
        self._folders: dict[Path, Folder] = {}

    @property
    def ours(self) -> bool:
        """Whether `metasae cache` wrote the cache, which then has a record and a folder for each split. Known after `open`."""
        return bool(self.record)

    def open(self, description: Mapping[str, Any], hooks: list[str], tokenizer: str | None = None) -> None:
        """Open the cache; refuse an unfinished one, and one of another model, text or tokenizer than the arguments say.

        `tokenizer` is a fingerprint; None is not checked. A folder of SAELens has no record of settings: only its hooks and context size
        are checked. Once the cache is open, a further call does nothing.
        """
        if self._folders:
            return
        if not self.path.is_dir():
            raise InputError(f"cache: {str(self.path)!r} is no folder; metasae cache writes one")
        record_file = self.path / RECORD
        self._hooks = hooks
        if record_file.exists():
            self.record = _json(record_file)
            expected = {**description, **({"tokenizer": tokenizer} if tokenizer else {})}
            differing = [
                f"{key}: {self.record['identity'].get(key)} there, {value} here"
                for key, value in expected.items()
                if self.record["identity"].get(key) != value
            ]
            if differing:
                raise InputError(f"cache: {self.path} was made of something else ({'; '.join(differing)})")
        elif any((self.path / split).exists() for split in SPLITS):
            raise InputError(f"cache: {self.path} is not finished: run metasae cache again, it goes on where it stopped")
        self.widths = self.folder("train").widths
        if not self.ours and self.folder("train").context_size != description["context_size"]:
            raise InputError(
                f"context_size: the contexts in {self.path} are {self.folder('train').context_size} long, got {description['context_size']}"
            )

    def folder(self, split: Split) -> Folder:
        """The folder that contains a split, memory-mapped on first use."""
        path = self.path / split if self.ours else self.path
        if path not in self._folders:
            self._folders[path] = Folder(path, self._hooks, self.record.get("shards", {}).get(split))
        return self._folders[path]


class ShardWriter:
    """Writes one split's folder shard by shard.

    A shard is either absent or whole. After each shard, the progress file holds the state from which the next shard is read. A new writer
    of the same folder continues from that state, or raises an InputError if the folder was begun with another description.
    """

    def __init__(self, path: Path, widths: Mapping[str, int], context_size: int, *, dtype: str, description: Mapping[str, Any]):
        self.description = dict(description)
        self.path, self.widths, self.context_size = path, widths, context_size
        shapes = {hook: datasets.Array2D(shape=(context_size, width), dtype=dtype) for hook, width in widths.items()}
        self.features = datasets.Features({**shapes, TOKENS: datasets.Sequence(datasets.Value("int32"), length=context_size)})
        self.dtype = np.dtype(dtype)
        path.mkdir(parents=True, exist_ok=True)
        self.shards: dict[str, int] = {}
        self.reader_state: Any = None
        with suppress(FileNotFoundError):
            begun_with, self.shards, self.reader_state = _read_progress(path / PROGRESS)
            if begun_with != self.description:
                raise InputError(f"cache: {path} was begun for something else ({begun_with}): name another folder")
            check_sizes(path, self.shards)

    def write(self, passes: Iterator[tuple[Tensor, Tensor]], reader_state: Callable[[], Any]) -> int:
        """Write one shard of all `passes` (tokens, activations) and the reader's state; return the number of contexts (0: no shard)."""
        name = f"data-{len(self.shards):05d}.arrow"
        draft, contexts = self.path / f".{name}", 0
        try:
            with pa.OSFile(str(draft), "wb") as file, pa.ipc.new_stream(file, self.features.arrow_schema) as stream:
                for tokens, activations in passes:
                    stream.write_batch(self._record(tokens, activations))
                    contexts += len(tokens)
            if contexts:
                size = draft.stat().st_size
                draft.replace(self.path / name)
                self.shards[name], self.reader_state = size, reader_state()
                self._write_progress()
        finally:
            draft.unlink(missing_ok=True)
        return contexts

    def _write_progress(self) -> None:
        """Write the progress file: the description, the shards, and the state of the reader, which holds tensors."""
        content = io.BytesIO()
        torch.save((self.description, self.shards, self.reader_state), content)
        write_bytes(self.path / PROGRESS, content.getvalue())

    def finish(self) -> None:
        """Write the files that `datasets.load_from_disk` needs beside the shards."""
        datasets.DatasetInfo(features=self.features).write_to_directory(str(self.path))
        state = {"_data_files": [{"filename": name} for name in self.shards], "_format_type": None, "_format_columns": None, "_split": None}
        state |= {"_fingerprint": hashlib.blake2b(json.dumps(self.shards).encode(), digest_size=8).hexdigest(), "_format_kwargs": {}}
        write_bytes(self.path / "state.json", json.dumps({**state, "_output_all_columns": False}, indent=2).encode())

    def _record(self, tokens: Tensor, activations: Tensor) -> pa.RecordBatch:
        """The Arrow rows of these contexts: a column for each hook, and the tokens."""
        columns: list[Any] = []
        parts = activations.cpu().split(list(self.widths.values()), dim=-1)
        for hook, part in zip(self.widths, parts, strict=True):
            if self.dtype == np.float16 and part.abs().max() > np.finfo(np.float16).max:
                raise InputError(f"store: float16 ends at 65504 and an activation of {hook} is larger: store float32")
            flat = pa.array(np.ascontiguousarray(part.numpy(), dtype=self.dtype).reshape(-1))
            inner = pa.ListArray.from_arrays(np.arange(0, len(flat) + 1, self.widths[hook], dtype=np.int32), flat)
            outer = pa.ListArray.from_arrays(np.arange(0, len(inner) + 1, self.context_size, dtype=np.int32), inner)
            columns.append(pa.ExtensionArray.from_storage(self.features.arrow_schema.field(hook).type, outer))
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(tokens.int().numpy().reshape(-1)), self.context_size))
        return pa.RecordBatch.from_arrays(columns, schema=self.features.arrow_schema)


def check_sizes(path: Path, shards: Mapping[str, int]) -> None:
    """Raise an error that names a shard whose size is not the size that was written."""
    for name, size in shards.items():
        actual = (path / name).stat().st_size if (path / name).exists() else 0
        if actual != size:
            raise InputError(f"cache: the shard {path / name} is damaged, {actual:,} bytes of {size:,}: remove {path} and write it again")


def finish(path: Path, description: Mapping[str, Any], metadata: Mapping[str, Any], shards: Mapping[Split, Mapping[str, int]]) -> None:
    """Write the record, which marks the cache as complete, and delete the progress files and their drafts that killed processes left."""
    write_bytes(path / RECORD, json.dumps({"identity": description, "about": metadata, "shards": shards}, indent=2).encode())
    for split in shards:
        for file in [path / split / PROGRESS, *(path / split).glob(f".{PROGRESS}.*")]:
            file.unlink(missing_ok=True)


def _read_progress(file: Path) -> Any:
    """The content of a progress file, which holds tensors and plain values alone; any other is refused."""
    try:
        description, shards, reader_state = torch.load(file, weights_only=True)
        return description, dict(shards), reader_state
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many types on damaged bytes
        raise InputError(
            f"cache: {file} was refused, and nothing in it was run: it is damaged, of an older version or holds more than tensors and "
            f"plain values; remove {file.parent} and write it again"
        ) from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"cache: {path.parent} holds no {path.name}: it is no folder of activations, or not a finished one") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cache: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _mapped(file: Path) -> pa.Table:
    try:
        return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cache: the shard {file} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _flat(column: Any) -> "np.ndarray":
    while not pa.types.is_primitive(column.type):
        column = column.storage if isinstance(column, pa.ExtensionArray) else column.flatten()
    return column.to_numpy(zero_copy_only=True)


def _view(column: Any, shape: tuple[int, int]) -> "np.ndarray":
    return _flat(column).reshape(-1, *shape)

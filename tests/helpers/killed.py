"""Runs a data stream in a process that a test kills and resumes. The hash of each batch is written to a file."""

import hashlib
import time
from pathlib import Path
from typing import Any

import torch

from metasae_lightning.corpora import TextFiles
from metasae_lightning.data import ActivationsDataModule
from metasae_lightning.lm import HuggingFaceLM


def data(folder: Path, **changes: Any) -> ActivationsDataModule:
    model = HuggingFaceLM(str(folder / "tiny"), "blocks.1.hook_resid_post", device="cpu")
    sizes = {"tokens": 16 * 400, "batch_size": 16, "context_size": 12, "buffer_size": 100, "forward_batch": 3, "held_out": 0.1}
    return ActivationsDataModule(model, TextFiles(str(folder / "text.txt"), shuffle_window=20), **{**sizes, **changes})


def run(folder: Path, name: str, seconds: float, changes: dict[str, Any]) -> None:
    """Resume the stream from its last checkpoint. Checkpoint after every batch, and sleep so that a kill can come in between."""
    torch.set_num_threads(1)
    module = data(folder, **changes)
    module.setup()
    checkpoint, hashes = folder / f"{name}.ckpt", folder / f"{name}.txt"
    stream, n_batches = module.train_dataloader(), 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        module.load_state_dict(saved["data"])
        n_batches = saved["batches"]
        # Batches after the last checkpoint come again: forget their hashes.
        hashes.write_text("".join(line + "\n" for line in hashes.read_text().split("\n")[: saved["batches"]]))
    for batch in stream:
        n_batches += 1
        with hashes.open("a") as file:
            file.write(hashlib.blake2b(batch.activations.numpy().tobytes(), digest_size=8).hexdigest() + "\n")
        draft = checkpoint.with_suffix(".draft")
        torch.save({"data": module.state_dict(), "batches": n_batches}, draft)
        draft.replace(checkpoint)
        time.sleep(seconds)
    (folder / f"{name}.done").touch()

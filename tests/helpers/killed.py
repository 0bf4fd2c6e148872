"""A stream that is run in processes of its own, killed, and gone on with; what it gave, hashed, in a file."""

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
    """Go on from the last saved place, saving after every batch, slowly enough to be killed in between."""
    torch.set_num_threads(1)
    module = data(folder, **changes)
    module.setup()
    place, written = folder / f"{name}.ckpt", folder / f"{name}.txt"
    stream, given = module.train_dataloader(), 0
    if place.exists():
        saved = torch.load(place, weights_only=False)
        module.load_state_dict(saved["data"])
        given = saved["batches"]
        # What was given after the last checkpoint is given again.
        written.write_text("".join(line + "\n" for line in written.read_text().split("\n")[: saved["batches"]]))
    for batch in stream:
        given += 1
        with written.open("a") as file:
            file.write(hashlib.blake2b(batch.activations.numpy().tobytes(), digest_size=8).hexdigest() + "\n")
        draft = place.with_suffix(".draft")
        torch.save({"data": module.state_dict(), "batches": given}, draft)
        draft.replace(place)
        time.sleep(seconds)
    (folder / f"{name}.done").touch()

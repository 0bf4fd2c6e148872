"""SAELens folders made ready for others and put where they find them."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors.torch import save_file
from torch import Tensor

from metasae_lightning.destinations import Destination, destination, hidden
from metasae_lightning.errors import InputError
from metasae_lightning.saelens.inference import load_pretrained

README = "README.md"
# SAELens's own offset under the logarithm of a density.
OFFSET = 1e-10


def stage(source: str | Path, draft: Path, *, metadata: Mapping[str, Any], density: Float[Tensor, " d_sae"] | None = None) -> SAE[Any]:
    """Copy an SAE's folder, with more said of it and how often its latents fire; returns it loaded back, the same to the bit."""
    source = Path(source)
    before = load_pretrained(source)
    draft.mkdir(parents=True)
    shutil.copyfile(source / SAE_WEIGHTS_FILENAME, draft / SAE_WEIGHTS_FILENAME)
    record = json.loads((source / SAE_CFG_FILENAME).read_text())
    record["metadata"] = hidden({**record.get("metadata", {}), **metadata})
    (draft / SAE_CFG_FILENAME).write_text(json.dumps(record, indent=1) + "\n")
    if density is not None:
        save_file({"sparsity": (density.float() + OFFSET).log10()}, draft / SPARSITY_FILENAME)
    after = load_pretrained(draft)
    theirs, ours = before.state_dict(), after.state_dict()
    if theirs.keys() != ours.keys() or not all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items()):
        raise InputError(f"{source}: what was written does not load back as what it was")
    return after


def publish(
    folders: Mapping[str, str | Path],
    dest: str | Path | Destination,
    *,
    card: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    replace: bool = False,
) -> str:
    """Put SAELens folders, each under its id, into a folder or into `hf://OWNER/NAME`, once each was loaded; returns where they are.

    What is there under the same id stays, unless it is to be replaced or is the same.
    """
    to = dest if isinstance(dest, Destination) else destination(dest, private=private, revision=revision)
    for name, folder in folders.items():
        if not name or name.startswith(("/", ".")) or ".." in name.split("/"):
            raise InputError(f"{name!r} is no id for an SAE: that would be letters, digits and slashes, such as blocks.8.hook_resid_post")
        load_pretrained(folder)
    there = to.listing()
    for name, folder in folders.items():
        if not replace and f"{name}/{SAE_CFG_FILENAME}" in there and to.read(f"{name}/{SAE_CFG_FILENAME}") != _record(folder):
            raise InputError(f"{to.place} holds another SAE under {name}: name another id, or replace it by --replace")
    with tempfile.TemporaryDirectory() as room:
        tree = Path(room) / "tree"
        for name, folder in folders.items():
            shutil.copytree(folder, tree / name)
        if card is not None:
            (tree / README).write_text(card)
        return to.put(tree, f"Add {', '.join(folders)}")


def _record(folder: str | Path) -> str:
    return (Path(folder) / SAE_CFG_FILENAME).read_text()

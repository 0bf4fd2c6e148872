"""SAELens folders made ready for others and put where they find them."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens import SAE
from sae_lens.constants import SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from safetensors.torch import save
from torch import Tensor

from metasae_lightning.destinations import Destination, destination
from metasae_lightning.errors import InputError
from metasae_lightning.redaction import hidden
from metasae_lightning.saelens.inference import load_pretrained

README = "README.md"
RECORD = "metasae.json"
KNOWN = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RECORD)
ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")
# SAELens's own offset under the logarithm of a density.
OFFSET = 1e-10


def stage(source: str | Path, draft: Path, *, metadata: Mapping[str, Any], density: Float[Tensor, " d_sae"] | None = None) -> SAE[Any]:
    """Copy an SAE's folder, with more said of it and how often its latents fire; returns it loaded back, the same to the bit."""
    source = Path(source)
    before = load_pretrained(source)
    copy(source, draft, **metadata)
    if density is not None:
        (draft / SPARSITY_FILENAME).write_bytes(save({"sparsity": (density.float() + OFFSET).log10()}))  # `save_file` hides it from others
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
    remove: Sequence[str] = (),
) -> str:
    """Put SAELens folders, each under its id, into a folder or into `hf://OWNER/NAME`, once each was loaded; returns where they are.

    Another SAE that is there under the same id stays, unless it is to be replaced; so does everything that is no SAE's. What goes out of a
    folder is what SAELens reads and our own record, without tokens. `remove` names ids whose SAEs go away in the same step.
    """
    to = dest if isinstance(dest, Destination) else destination(dest, private=private, revision=revision)
    for name, folder in folders.items():
        if not ID.fullmatch(name) or README in name.split("/"):
            raise InputError(f"{name!r} is no id for an SAE: that would be letters, digits and slashes, such as blocks.8.hook_resid_post")
        load_pretrained(folder)
    there = to.listing()
    for name, folder in folders.items():
        weights = f"{name}/{SAE_WEIGHTS_FILENAME}"
        if not replace and weights in there and not to.same(weights, Path(folder) / SAE_WEIGHTS_FILENAME):
            raise InputError(f"{to.place} holds another SAE under {name}: name another id, or replace it by --replace true")
    with tempfile.TemporaryDirectory() as room:
        tree = Path(room) / "tree"
        for name, folder in folders.items():
            copy(Path(folder), tree / name)
        if card is not None:
            (tree / README).write_text(card, encoding="utf-8")
        new = {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}
        old = {f"{name}/{file}" for name in (*folders, *remove) for file in KNOWN} & there
        return to.put(tree, f"Add {', '.join(folders)}", remove=sorted(old - new))


def copy(folder: Path, draft: Path, **said: Any) -> None:
    """What is known of an SAE's folder, with more said of it in its config, and no token."""
    draft.mkdir(parents=True)
    for name in KNOWN:
        if (folder / name).exists():
            shutil.copyfile(folder / name, draft / name)
    record = json.loads((folder / SAE_CFG_FILENAME).read_text())
    record["metadata"] = hidden({**record.get("metadata", {}), **said})
    (draft / SAE_CFG_FILENAME).write_text(json.dumps(record, indent=1) + "\n")

"""A trained head beside an exported SAE: its output on raw activations, and its folder."""

import copy
import json
from importlib import import_module
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from metasae_lightning.atomic_files import draft_of
from metasae_lightning.compute.sharding import local
from metasae_lightning.errors import InputError
from metasae_lightning.sae.normalizers import Normalizer, make_normalizer, name_of
from metasae_lightning.step import Codes

CONFIG, WEIGHTS = "head.json", "head.safetensors"


@final
class ExportedHead(nn.Module):
    """A head with the normaliser that it was trained behind. It reads the codes of the exported SAE.

    Args:
        head: The head, a `heads.Head`.
        normalizer: The normaliser of the SAE in training.
        code_scale: For each latent, the ratio of its activation in training to that of the exported SAE.
    """

    code_scale: Tensor

    def __init__(self, head: nn.Module, normalizer: Normalizer, code_scale: Float[Tensor, " d_sae"]) -> None:
        super().__init__()
        self.head, self.normalizer = head, normalizer
        self.register_buffer("code_scale", code_scale)

    def forward(self, x: Float[Tensor, "row d_in"], codes: Codes) -> Float[Tensor, "row d_in"]:
        """The head's part of the reconstruction of raw activations: `restore(h) - restore(0)` for its output `h` on their codes."""
        values = codes.values.to(self.code_scale.dtype) * self.code_scale[codes.latents]
        output = self.head(Codes(codes.rows, codes.latents, values, codes.shape))
        undo = self.normalizer.normalize(x.to(output.dtype))[1]
        return self.normalizer.restore(output, undo) - self.normalizer.restore(torch.zeros_like(output), undo)


def save_head(learner: Any, exported: Any, folder: Path) -> None:
    """Write the head of a learner beside its exported SAE: a folder with its weights, class and arguments."""
    head, normalizer, W_dec = learner.head, learner.normalizer, learner.W_dec
    scale = code_scale(learner.sae, exported, normalizer).to(W_dec.dtype)
    state = ExportedHead(head, normalizer, scale.to(W_dec.device)).state_dict()
    config = {
        **{"class_path": f"{type(head).__module__}.{type(head).__qualname__}", "init_args": head.arguments},
        **{"head_training": learner.config.head_training, "normalize_activations": name_of(normalizer)},
        **{"d_sae": W_dec.shape[0], "d_in": W_dec.shape[1]},
    }
    try:
        with draft_of(folder) as draft:
            draft.mkdir()
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, draft / WEIGHTS)
            (draft / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot write the head's folder {folder}: {error}") from error


def load_head(folder: Path, d_sae: int, d_in: int) -> ExportedHead | None:
    """The head in a folder, for an SAE of these sizes, on the CPU; None where there is no such folder."""
    if not (folder / CONFIG).exists():
        return None
    try:
        config, state = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        module, _, name = config["class_path"].rpartition(".")
        head = getattr(import_module(module), name)(**config["init_args"])
        if (config["d_sae"], config["d_in"]) != (d_sae, d_in):
            raise InputError(
                f"{folder}: the head is of {config['d_sae']} latents and width {config['d_in']}, the SAE of {d_sae} and {d_in}"
            )
        with torch.random.fork_rng():
            head.build(d_sae, d_in)
        loaded = ExportedHead(head, make_normalizer(config["normalize_activations"], d_in), torch.ones(d_sae))
        loaded.load_state_dict(state)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read as a head: {' '.join(str(error).split())}") from error
    return loaded.requires_grad_(False)


@torch.no_grad()
def code_scale(sae: Any, exported: Any, normalizer: Normalizer) -> Float[Tensor, " d_sae"]:
    """For each latent, the ratio of its activation in training to that of the exported SAE, which works on raw activations.

    A latent with activation `f` and row `r` adds `f r` to the reconstruction. In raw space both SAEs add the same: `f R(r) = f' r'`, where
    `R` is the normaliser's linear map back to raw space. So the ratio is `f / f' = ||r'|| / ||R(r)||`. It is 1 where no norm was folded.
    """
    rows = _rows(sae).cpu().double()
    if normalizer.per_token is None:
        affine = copy.deepcopy(normalizer).cpu()
        rows = affine.restore(rows, ()) - affine.restore(torch.zeros_like(rows), ())
    norms, exported_norms = rows.norm(dim=-1), _rows(exported).cpu().double().norm(dim=-1)
    return torch.where(norms > 0, exported_norms / norms.clamp(min=1e-300), 1.0)


def _rows(sae: Any) -> Tensor:
    """The contribution of each latent to the reconstruction at activation 1."""
    rows = local(sae.W_dec).detach()
    return nn.functional.normalize(rows, dim=-1) if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False) else rows

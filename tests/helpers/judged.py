"""SAEs on a tiny model's activations, in folders, with the data to judge them on."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from tests.helpers.models import documents, save_model

HOOK = "blocks.1.hook_resid_post"
D_IN = 32


def recipe(folder: Path, *, hook: str = HOOK, **more: Any) -> dict[str, Any]:
    """The data part of a recipe on a tiny model and some text."""
    model, text = folder / "model", folder / "text.jsonl"
    if not model.exists():
        save_model(model, "llama", layers=3)
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents(200)))
    return {
        "class_path": "metasae_lightning.ActivationsDataModule",
        "init_args": {
            "language_model": {
                "class_path": "metasae_lightning.lm.HuggingFaceLM",
                "init_args": {"name": str(model), "hook": hook, "device": "cpu"},
            },
            "corpus": {"class_path": "metasae_lightning.corpora.TextFiles", "init_args": {"paths": str(text)}},
            **{"tokens": 2048, "batch_size": 64, "context_size": 16, "buffer_size": 256, "held_out": 0.2, "forward_batch": 8},
            **{"validation_tokens": 512, "test_tokens": 700, **more},
        },
    }


def sae(seed: int = 0, d_sae: int = 48, threshold: float = 0.5, **metadata: Any) -> JumpReLUSAE:
    """An SAE of random directions whose encoder is its decoder."""
    generator = torch.Generator().manual_seed(seed)
    made = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=d_sae, dtype="float32", device="cpu"))
    rows = torch.nn.functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=-1)
    weights = {"W_dec": rows, "W_enc": rows.T.clone(), "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(D_IN)}
    made.load_state_dict({**weights, "threshold": torch.full((d_sae,), threshold)})
    for name, value in metadata.items():
        made.cfg.metadata[name] = value
    return made


def run(folder: Path, name: str, *, seed: int = 0, hook: str = HOOK, k: float = 8.0, d_sae: int = 48, **more: Any) -> Path:
    """A run's folder as one leaves it: its config, and the SAE that it exported."""
    place = folder / name
    (place / "saes").mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump({"data": recipe(folder, hook=hook)}))
    told = {"model_name": str(folder / "model"), "hook_name": hook, "training_architecture_details": {"k": k}, "training_tokens": 2048}
    sae(seed, d_sae, **{**told, **more}).save_model(place / "saes" / "primary")
    return place

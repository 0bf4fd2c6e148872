"""SAEs on a tiny model's activations, in folders, with the data to evaluate them on."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from tests.helpers.models import documents, save_model

HOOK = "blocks.1.hook_resid_post"
D_IN = 32


def data_config(folder: Path, *, hook: str = HOOK, **changes: Any) -> dict[str, Any]:
    """The `data` section of a config, on a tiny model and 200 short documents; writes both if they do not exist."""
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
            **{"validation_tokens": 512, "test_tokens": 700, **changes},
        },
    }


def sae(seed: int = 0, d_sae: int = 48, threshold: float = 0.5, **metadata: Any) -> JumpReLUSAE:
    """An SAE of random directions whose encoder is its decoder."""
    generator = torch.Generator().manual_seed(seed)
    untrained = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=d_sae, dtype="float32", device="cpu"))
    rows = torch.nn.functional.normalize(torch.randn(d_sae, D_IN, generator=generator), dim=-1)
    weights = {"W_dec": rows, "W_enc": rows.T.clone(), "b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(D_IN)}
    untrained.load_state_dict({**weights, "threshold": torch.full((d_sae,), threshold)})
    for name, value in metadata.items():
        untrained.cfg.metadata[name] = value
    return untrained


def write_run(folder: Path, name: str, *, seed: int = 0, hook: str = HOOK, k: float = 8.0, d_sae: int = 48, **metadata: Any) -> Path:
    """Write the folder of a finished run, its config and its exported SAE; returns the folder."""
    run_folder = folder / name
    (run_folder / "saes").mkdir(parents=True)
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"data": data_config(folder, hook=hook)}))
    default_metadata = {
        "model_name": str(folder / "model"),
        "hook_name": hook,
        "training_architecture_details": {"k": k},
        "training_tokens": 2048,
    }
    sae(seed, d_sae, **{**default_metadata, **metadata}).save_model(run_folder / "saes" / "primary")
    return run_folder

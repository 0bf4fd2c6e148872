"""The data module that an SAE is evaluated with."""

from pathlib import Path
from typing import Any

from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.data.recipe import data_of
from metasae_lightning.evaluation.saes import EvaluatedSAE, corpus_of, language_model_of
from metasae_lightning.lm.device import parse_device
from metasae_lightning.run_folder import config_file


def data_for(sae: EvaluatedSAE, *, recipe: str | Path | None = None, device: str | None = None) -> Any:
    """The data module of `recipe`, or of the SAE's run, or else one built from the SAE's metadata. `device` moves its language model."""
    recipe = recipe or (None if sae.run is None else config_file(sae.run))
    if recipe is not None:
        data = data_of(Path(recipe))
    else:
        metadata = sae.metadata
        skip = (metadata.get("seqpos_slice") or [0])[0] or 0
        sizes: dict[str, Any] = {"context_size": metadata.get("context_size") or 128, "prepend_bos": metadata.get("prepend_bos", True)}
        sizes |= {"held_out": metadata.get("held_out") or 0.05, "max_norm_ratio": metadata.get("max_norm_ratio")}
        data = ActivationsDataModule(language_model_of(sae), corpus_of(sae), tokens=4096, skip_positions=skip, **sizes)
    # A wrong name is refused even if the data have no language model.
    named_device = None if device is None else parse_device(device)
    if named_device is not None and isinstance(data, ActivationsDataModule):
        data.language_model.set_device(named_device)
    return data

"""The command `export-dashboard`: dashboards of an SAE's latents as files for SAEDashboard and Neuronpedia."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from metasae_lightning.cli.arguments import data_for, open_saes
from metasae_lightning.data.datamodule import ActivationsDataModule
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.collect import collect
from metasae_lightning.evaluation.dashboards import Source, layer_of, write_dashboards
from metasae_lightning.evaluation.held_out_text import split_stream
from metasae_lightning.evaluation.saes import device_of, select_hook


def export_dashboard(args: Namespace) -> int:
    """Read held-out text, and write the dashboards of all latents that fired on it."""
    for name in ("tokens", "contexts", "latents_per_file"):
        if args[name] is not None and args[name] < 1:
            raise InputError(f"{name} must be at least 1, got {args[name]}")
    (sae,) = open_saes([args.place], None)
    data = data_for(sae, args)
    if not isinstance(data, ActivationsDataModule):
        raise InputError(f"{args.place} reads activations without text, which dashboards show: name a recipe with text, --data RECIPE")
    hook = select_hook(sae, data)
    sae.sae.to(device_of(data))
    data.setup("test")
    tokens = args.tokens or data.test_tokens
    (collected,) = collect([sae], split_stream(data, "test", tokens), tokens)
    source = Source(
        model_id=args.model_id or Path(data.language_model.name).name,
        sae_set=args.sae_set or sae.slug,
        layer=layer_of(str(sae.metadata.get("hook_name") or hook)),
        dataset=args.dataset or dataset_name(sae.metadata),
        prompts=sum(len(entry["owner"]) for entry in collected.entries()),
        context_size=data.batching.context_size,
    )
    out = Path(args.out) if args.out else sae.folder / "dashboards"
    live = write_dashboards(collected, data.language_model, out, source, contexts=args.contexts, per_file=args.latents_per_file)
    Console().print(f"{out}: dashboards of {live:,} latents of {source.model_id}, layer {source.layer}", soft_wrap=True)
    return 0


def dataset_name(metadata: dict[str, Any]) -> str:
    """The name of the text in an SAE's metadata; the last part of a local path."""
    path = str(metadata.get("dataset_path") or "")
    return Path(path).name if Path(path).is_absolute() else path

"""The command `saebench`: SAEBench's evaluations of a run's SAEs."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from metasae_lightning import run_folder
from metasae_lightning.cli.arguments import data_for, open_saes, places_of_arms
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.saebench import figures, held_out_contexts, model_place, run_saebench, saebench_python
from metasae_lightning.evaluation.saes import EvaluatedSAE

# The figures of each evaluation that are printed; its file has all of them.
PRINTED = {"core": ("explained_variance", "l0", "ce_loss_score"), "meta_structure": ("decoder_fraction_variance_explained",)}


def evaluate_with_saebench(args: Namespace) -> int:
    """Run SAEBench's evaluations on a run's SAEs, and write the results of each into its folder."""
    for name in ("tokens", "steps"):
        if args[name] < 1:
            raise InputError(f"{name} must be at least 1, got {args[name]}")
    python = saebench_python(args.python)
    saes = open_saes(places_of_arms([args.place]), args.out)
    settings: dict[str, dict[str, Any]] = {"meta_structure": {"steps": args.steps, "seed": args.seed}}
    if "core" in args.evals:
        settings["core"] = core_settings(saes[0], args)
    for sae in saes:
        folder = Path(args.out) if args.out else sae.folder / "saebench"
        for evaluation in dict.fromkeys(args.evals):
            result = run_saebench(python, sae, evaluation, **settings[evaluation])
            found, file = figures(result), folder / f"{evaluation}.json"
            run_folder.write_file(file, result)
            line = ", ".join(f"{name} {found[name]:.4g}" for name in PRINTED[evaluation] if name in found)
            Console().print(f"{file}: {line}", soft_wrap=True)
    return 0


def core_settings(sae: EvaluatedSAE, args: Namespace) -> dict[str, Any]:
    """The language model and the contexts of the core evaluation. The loaded model is freed: SAEBench loads its own."""
    data = data_for(sae, Namespace(data=args.data, device="cpu"))
    tokens = held_out_contexts(sae, data, args.tokens)
    return {"model": model_place(data.language_model), "tokens": tokens}

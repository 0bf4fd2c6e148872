"""SAEBench's `core` and `meta_structure` on an SAE, as `metasae saebench` runs them, beside the same figures by this project.

    python -m venv saebench && saebench/bin/pip install sae-bench==0.6.0 "datasets<4"   # SAEBench, in an environment of its own
    python benchmarks/saebench.py --saebench saebench/bin/python runs/quickstart-.../saes/primary
    python benchmarks/saebench.py --saebench saebench/bin/python FOLDER --evals core --tokens 2048 --out found.json

"here" is this project's code with transformers' model, on the same tokens and by SAEBench's rules: documents attend to each other; first
positions and attention sinks count; special tokens do not count, and keep their activations except in the ablation. `metasae test` masks
other documents and leaves out the positions and sinks that the recipe leaves out, so its figures differ.
`meta_structure` trains one critic with one seed on the decoder: four minutes of a CPU core for 4,608 rows of 576 in SAEBench, and as long
here; `--steps 100` gives a quick, rough figure.

SAEBench 0.6.0 computes `explained_variance` by a formula of its own (core/main.py, `get_sparsity_and_variance_metrics`): with d numbers per
token it subtracts (E||x||^2 / d)^2 from E||x||^2, instead of ||E x||^2. "here" has both: the first line is 1 - FVU. SAEBench's
`relative_reconstruction_bias` is a mean of the batches' ratios; this project's is one ratio of sums.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from machine import machine_description
from torch import Tensor

from metasae_lightning.evaluation.saebench import figures, held_out_contexts, model_place, run_saebench, saebench_python
from metasae_lightning.evaluation.saebench_script import PROMPTS, special_tokens

EVALS = ("core", "meta_structure")
# Names of a figure in SAEBench and here.
CORE = (
    ("explained_variance", "explained_variance"),
    ("explained_variance", "by_its_formula"),
    ("explained_variance_legacy", "explained_variance_legacy"),
    ("cossim", "cosine"),
    ("l2_ratio", "l2_ratio"),
    ("relative_reconstruction_bias", "gamma"),
    ("l0", "l0"),
    ("l1", "l1"),
    ("frac_alive", "alive"),
    ("average_max_decoder_cosine_sim", "nearest_mean"),
    ("ce_loss_without_sae", "ce_clean"),
    ("ce_loss_with_sae", "ce_sae"),
    ("ce_loss_with_ablation", "ce_zero"),
    ("ce_loss_score", "recovered_zero"),
    ("kl_div_with_sae", "kl"),
)
META = (("decoder_fraction_variance_explained", "fve"),)


@torch.no_grad()
def our_core(evaluated: Any, model: Any, tokens: Tensor) -> dict[str, float]:
    """The core figures by this project's formulas, on the same tokens."""
    from metasae_lightning import functional
    from metasae_lightning.metrics import DeadLatents, Reconstruction

    d_sae, d_in = evaluated.W_dec.shape
    complete, clean_acts = model.complete(), []
    metric, dead = Reconstruction(d_in), DeadLatents(d_sae)
    ignored = torch.tensor(sorted(special_tokens(model.tokenizer)))
    losses: list[Tensor] = []
    kl: list[Tensor] = []
    legacy: list[Tensor] = []
    squares: list[Tensor] = []
    errors: list[Tensor] = []
    for batch in tokens.split(PROMPTS):
        counted = ~torch.isin(batch, ignored)

        def capture(acts: Tensor, clean_acts: list[Tensor] = clean_acts) -> Tensor:
            clean_acts[:] = [acts]
            return acts

        def reconstruct(acts: Tensor, counted: Tensor = counted) -> Tensor:
            return acts.index_put((counted,), evaluated.reconstruct(acts[counted]))

        targets = batch[:, 1:]
        clean = complete.logits(batch, edit=capture)
        spliced = complete.logits(batch, edit=reconstruct)
        zero = complete.logits(batch, edit=torch.zeros_like)
        # A prediction counts if the token at its position counts.
        ce = [functional.cross_entropy(logits[:, :-1], targets)[counted[:, :-1]] for logits in (clean, spliced, zero)]
        losses.append(torch.stack(ce).double())
        kl.append(functional.kl_divergence(clean, spliced)[counted].double())
        x = clean_acts[0][counted]
        codes, reconstruction = evaluated.encode_decode(x)
        metric.update(x, reconstruction, codes)
        dead.update(codes)
        error, variance = (x - reconstruction).double().square().sum(1), (x - x.mean(0)).double().square().sum(1)
        legacy.append(1 - error / variance)
        squares.append(x.double().square().sum(1).mean())
        errors.append(error.mean())
    figures = {name: value.item() for name, value in metric.compute().items()}
    clean, sae, zero = torch.cat(losses, 1).mean(1).tolist()
    square = torch.stack(squares).mean()
    return {
        **{**figures, "explained_variance": 1 - figures["fvu"], "explained_variance_legacy": torch.cat(legacy).mean().item()},
        "by_its_formula": (1 - torch.stack(errors).mean() / (square - (square / d_in).square())).item(),
        **{"alive": 1 - dead.compute()["dead"].item(), "nearest_mean": functional.nearest_cosines(evaluated.W_dec).mean().item()},
        **{"ce_clean": clean, "ce_sae": sae, "ce_zero": zero, "recovered_zero": (zero - sae) / (zero - clean)},
        "kl": torch.cat(kl).mean().item(),
    }


def our_meta_structure(evaluated: Any, steps: int, seed: int) -> dict[str, float]:
    """This project's critic on the decoder's directions."""
    from metasae_lightning.functional import unit_rows
    from metasae_lightning.metrics import Decomposition

    return {"fve": Decomposition(steps=steps).variance_explained(unit_rows(evaluated.W_dec), seed)}


def print_table(names: tuple[tuple[str, str], ...], theirs: dict[str, float], ours: dict[str, float]) -> None:
    """Print the figures of both side by side."""
    print(f"  {'name in SAEBench':32}{'SAEBench':>12}{'here':>12}  name here")
    for their_name, our_name in names:
        print(f"  {their_name:32}{theirs[their_name]:>12.5g}{ours[our_name]:>12.5g}  {our_name}", flush=True)


def main() -> None:
    """Evaluate the SAE with SAEBench and here, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", help="a SAELens folder, or a run", metavar="SAE_FOLDER")
    parser.add_argument("--saebench", required=True, help="the interpreter of SAEBench's environment", metavar="PYTHON")
    parser.add_argument("--evals", nargs="+", choices=EVALS, default=list(EVALS))
    parser.add_argument(
        "--tokens", type=int, default=4096, help=f"number of tokens of the core evaluation, in batches of {PROMPTS} contexts"
    )
    parser.add_argument("--steps", type=int, default=1500, help="number of training steps of the critic")
    parser.add_argument("--seed", type=int, default=0, help="seed of the critic")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file", metavar="FILE")
    args = parser.parse_args()
    from metasae_lightning.cli.arguments import data_for
    from metasae_lightning.evaluation.saes import load_sae

    python, evaluated = saebench_python(args.saebench), load_sae(args.sae)
    print(f"{machine_description()}\n{evaluated.source}", flush=True)
    record: dict[str, Any] = {"sae": evaluated.source, "steps": args.steps, "seed": args.seed, "saebench": {}, "here": {}}
    if "core" in args.evals:
        data = data_for(evaluated, argparse.Namespace(data=None, device="cpu"))
        tokens = held_out_contexts(evaluated, data, args.tokens)
        record["tokens"] = tokens.numel()
        print(f"core, {tokens.numel():,} tokens in {len(tokens)} contexts", flush=True)
        result = run_saebench(python, evaluated, "core", model=model_place(data.language_model), tokens=tokens)
        record["saebench"]["core"], record["here"]["core"] = figures(result), our_core(evaluated, data.language_model, tokens)
        print_table(CORE, record["saebench"]["core"], record["here"]["core"])
    if "meta_structure" in args.evals:
        print(f"meta_structure, {len(evaluated.W_dec):,} rows, {args.steps:,} steps", flush=True)
        result = run_saebench(python, evaluated, "meta_structure", steps=args.steps, seed=args.seed)
        record["saebench"]["meta_structure"] = figures(result)
        record["here"]["meta_structure"] = our_meta_structure(evaluated, args.steps, args.seed)
        print_table(META, record["saebench"]["meta_structure"], record["here"]["meta_structure"])
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

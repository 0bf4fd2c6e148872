"""SAEBench's `core` and `meta_structure` on an SAE folder, offline, and the same figures by this project.

    python -m venv saebench && saebench/bin/pip install sae-bench==0.6.0 "datasets<4"   # SAEBench, in an environment of its own
    python benchmarks/saebench.py --saebench saebench/bin/python runs/quickstart-.../saes/primary
    python benchmarks/saebench.py --saebench saebench/bin/python FOLDER --evals core --tokens 2048 --out found.json

SAEBench runs in its own environment, as a subprocess. It reads a local model, and contexts of held-out tokens that this environment
prepares: from the run's recipe if the folder is a run's `saes/primary`, otherwise from the data set in the SAE's metadata. SAEBench's
commands accept only names on the Hub. Its `core.main.run_evals` accepts a model, an SAE and a store: it gets a `HookedTransformer` of the
local folder (whose predictions are compared with those of transformers), the SAE, and SAELens's `ActivationsStore` of the tokens.

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
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine_description
from safetensors.torch import load_file, save_file
from torch import Tensor

PROMPTS = 8
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


def special_tokens(tokenizer: Any) -> set[int]:
    """The tokens that SAEBench's command leaves out of the core evaluation."""
    return {token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None}


def hooked_transformer(name: str, n_ctx: int) -> Any:
    """TransformerLens's model of a name or local folder, without weight processing. Its `from_pretrained` accepts no folder."""
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoTokenizer

    if not Path(name).is_dir():
        return HookedTransformer.from_pretrained_no_processing(name, device="cpu")
    # Each layer stores a mask of `n_ctx` positions; the default is every position that the model supports.
    config = loading_from_pretrained.get_pretrained_model_config(name, device="cpu", dtype=torch.float32, n_ctx=n_ctx)
    weights = loading_from_pretrained.get_pretrained_state_dict(name, config, dtype=torch.float32)
    model = HookedTransformer(config, AutoTokenizer.from_pretrained(name), move_to_device=False)
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model


@torch.no_grad()
def largest_difference(model: Any, name: str, tokens: Tensor) -> float:
    """The largest difference of any log-probability from that of transformers."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    logits, reference_logits = model(tokens, prepend_bos=False), reference(tokens).logits
    return (logits.log_softmax(-1) - reference_logits.log_softmax(-1)).abs().max().item()


def their_core(sae: Any, name: str, tokens: Tensor) -> dict[str, float]:
    """SAEBench's core evaluation, in its environment."""
    from datasets import Dataset
    from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.core.main import calculate_misc_metrics, run_evals  # pyright: ignore[reportMissingImports]
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import ActivationsStore

    _, sae, _ = load_and_format_sae("local", sae, "cpu")  # writes hook and layer to the fields that `run_evals` reads
    model = hooked_transformer(name, tokens.shape[1])
    difference = largest_difference(model, name, tokens[:1])
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    store = ActivationsStore.from_sae(model, sae, data, context_size=tokens.shape[1], streaming=False, total_tokens=len(tokens))
    # All batches: the store does not restart at its reset, and so the second evaluation gets the same tokens only after a full cycle.
    batches = len(tokens) // PROMPTS
    metrics = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
    config = CoreEvalConfig(
        batch_size_prompts=PROMPTS,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        exclude_special_tokens_from_reconstruction=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        **{f"compute_{metric}": True for metric in metrics},
    )
    groups, latent_metrics = run_evals(sae, store, model, config, ignore_tokens=special_tokens(model.tokenizer))
    figures = {figure: value for group in groups.values() for figure, value in group.items()}
    return {**figures, **calculate_misc_metrics(latent_metrics), "log_probabilities_differ_by": difference}


def their_meta_structure(sae: Any, steps: int, seed: int) -> dict[str, float]:
    """SAEBench's critic on the decoder, in its environment. SAEBench seeds only torch; autocast would slow a CPU tenfold."""
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.meta_structure.main import run_eval_single_sae  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    config = MetaStructureEvalConfig(random_seed=seed, train_steps=steps, autocast=False)
    result = run_eval_single_sae("local", "local", sae, config, "cpu").eval_result_metrics.meta_structure
    return {name: getattr(result, name) for name in ("decoder_fraction_variance_explained", "final_reconstruction_mse")}


def theirs(folder: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """SAEBench's figures by evaluation; runs in SAEBench's environment."""
    from sae_lens import SAE

    results: dict[str, dict[str, float]] = {}
    for name in args.evals:
        sae, start = SAE.load_from_disk(folder), time.process_time()
        if name == "core":
            results[name] = their_core(sae, args.model, load_file(args.alone)["tokens"].long())
        else:
            results[name] = their_meta_structure(sae, args.steps, args.seed)
        results[name]["cpu_seconds"] = time.process_time() - start
    return results


def run_saebench(folder: Path, model: str, tokens: Tensor, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run `theirs` in SAEBench's environment."""
    with tempfile.TemporaryDirectory() as temporary:
        file = f"{temporary}/tokens.safetensors"
        save_file({"tokens": tokens.int().contiguous()}, file)
        command = [args.saebench, __file__, str(folder), "--alone", file, "--model", model, "--evals", *args.evals]
        command += ["--steps", str(args.steps), "--seed", str(args.seed)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout.strip().split("\n")[-1])


def held_out(evaluated: Any, n_tokens: int) -> tuple[Any, Tensor]:
    """The language model of an `EvaluatedSAE`, and contexts with about `n_tokens` held-out tokens, in full batches."""
    from metasae_lightning.cli.arguments import data_for
    from metasae_lightning.evaluation import held_out_text
    from metasae_lightning.evaluation.saes import select_hook

    data = data_for(evaluated, argparse.Namespace(data=None, device="cpu"))
    if getattr(data, "language_model", None) is None:
        raise SystemExit(f"{evaluated.source} reads planted activations: SAEBench's core evaluation needs a language model")
    data.language_model.dtype = torch.float32
    select_hook(evaluated, data)
    data.setup("test")
    contexts, count = [], 0
    max_tokens = 2 * n_tokens  # fewer rows count than there are tokens
    for passage in held_out_text.passages(held_out_text.split_stream(data, "test", max_tokens), max_tokens):
        contexts.append(passage.tokens)
        count += passage.tokens.numel()
        if count >= n_tokens:
            break
    tokens = torch.cat(contexts)
    batches = min(max(1, n_tokens // (PROMPTS * tokens.shape[1])), len(tokens) // PROMPTS)
    if not batches:
        raise SystemExit(f"{evaluated.source}: the held-out text has {len(tokens)} contexts, and a batch is {PROMPTS}")
    return data.language_model, tokens[: batches * PROMPTS]


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
    parser.add_argument("--saebench", help="the interpreter of SAEBench's environment", metavar="PYTHON")
    parser.add_argument("--evals", nargs="+", choices=EVALS, default=list(EVALS))
    parser.add_argument(
        "--tokens", type=int, default=4096, help=f"number of tokens of the core evaluation, in batches of {PROMPTS} contexts"
    )
    parser.add_argument("--steps", type=int, default=1500, help="number of training steps of the critic")
    parser.add_argument("--seed", type=int, default=0, help="seed of the critic")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file", metavar="FILE")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(theirs(args.sae, args)))
        return
    if not args.saebench:
        parser.error("--saebench is needed: the interpreter of SAEBench's environment")
    from metasae_lightning.evaluation.saes import load_sae
    from metasae_lightning.lm.embedded_model import EMBEDDED, embedded_folder

    evaluated = load_sae(args.sae)
    folder = (Path(evaluated.source) / "saes" / "primary" if evaluated.run else Path(evaluated.source)).resolve()
    model, tokens = held_out(evaluated, args.tokens) if "core" in args.evals else (None, torch.zeros(0, 1))
    name = "" if model is None else str(embedded_folder()) if model.name == EMBEDDED else model.name
    print(f"{machine_description()}\n{folder}", flush=True)
    saebench = run_saebench(folder, name, tokens, args)
    ours: dict[str, dict[str, float]] = {}
    if "core" in args.evals:
        ours["core"] = our_core(evaluated, model, tokens)
        difference = saebench["core"]["log_probabilities_differ_by"]
        bound = f"log-probabilities differ from transformers' by at most {difference:.1g}"
        print(f"core, {tokens.numel():,} tokens in {len(tokens)} contexts; {bound}")
        print_table(CORE, saebench["core"], ours["core"])
    if "meta_structure" in args.evals:
        ours["meta_structure"] = our_meta_structure(evaluated, args.steps, args.seed)
        print(f"meta_structure, {len(evaluated.W_dec):,} rows, {args.steps:,} steps")
        print_table(META, saebench["meta_structure"], ours["meta_structure"])
    print("CPU seconds of SAEBench: " + ", ".join(f"{name} {figures['cpu_seconds']:.0f}" for name, figures in saebench.items()))
    if args.out:
        record = {"sae": str(folder), "tokens": tokens.numel(), "steps": args.steps, "seed": args.seed}
        args.out.write_text(json.dumps({**record, "saebench": saebench, "here": ours}, indent=1) + "\n")


if __name__ == "__main__":
    main()

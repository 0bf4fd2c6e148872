"""SAEBench's `core` and `meta_structure` on an SAE folder, offline, beside the same figures from this project.

    python -m venv saebench && saebench/bin/pip install sae-bench==0.6.0 "datasets<4"   # SAEBench, in an environment of its own
    python benchmarks/saebench.py --saebench saebench/bin/python runs/quickstart-.../saes/primary
    python benchmarks/saebench.py --saebench saebench/bin/python FOLDER --evals core --tokens 2048 --out found.json

SAEBench runs in its environment, as a subprocess, and reads a local model and contexts of held-out tokens that this environment makes:
of the run's own recipe where the folder is a run's `saes/primary`, and else of what the SAE says it was trained on. SAEBench's commands
take names on the Hub alone; its `core.main.run_evals` takes a model, an SAE and a store, and is given a `HookedTransformer` of the local
folder (whose predictions are compared with transformers'), the SAE, and SAELens's `ActivationsStore` of the tokens.

"here" is this project's code and transformers' model on the same tokens by SAEBench's rules: documents attend to each other, the first
positions and sinks count, special tokens do not and keep their activations, but for ablation. `metasae test` keeps documents apart and
leaves out the positions and sinks that the recipe does, and so comes to other figures.
`meta_structure` is one critic of one seed on the decoder: four minutes of a CPU core for 4,608 rows of 576, and as long again here;
`--steps 100` is a look.

SAEBench 0.6.0 works out `explained_variance` by a formula of its own (core/main.py, `get_sparsity_and_variance_metrics`): of d numbers a
token it takes (E||x||^2 / d)^2 from E||x||^2, where ||E x||^2 is due. "here" has it both ways; 1 - FVU is the first. Its
`relative_reconstruction_bias` is a mean over batches' ratios, and ours one ratio of sums.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import described
from safetensors.torch import load_file, save_file
from torch import Tensor

PROMPTS = 8
EVALS = ("core", "meta_structure")
# How a figure is called by SAEBench, and here.
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


def special(tokenizer: Any) -> set[int]:
    """The tokens that SAEBench's own command leaves out of the core evaluation."""
    return {token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None}


def lens(name: str, n_ctx: int) -> Any:
    """A model as TransformerLens has it, unprocessed; its `from_pretrained` takes its own names, and a folder by these steps."""
    from transformer_lens import HookedTransformer, loading_from_pretrained
    from transformers import AutoTokenizer

    if not Path(name).is_dir():
        return HookedTransformer.from_pretrained_no_processing(name, device="cpu")
    # A mask of all positions that the model knows would be held by each layer.
    config = loading_from_pretrained.get_pretrained_model_config(name, device="cpu", dtype=torch.float32, n_ctx=n_ctx)
    weights = loading_from_pretrained.get_pretrained_state_dict(name, config, dtype=torch.float32)
    model = HookedTransformer(config, AutoTokenizer.from_pretrained(name), move_to_device=False)
    model.load_and_process_state_dict(weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model


@torch.no_grad()
def differing(model: Any, name: str, tokens: Tensor) -> float:
    """The largest difference of any token's log-probability from transformers' own."""
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    one, two = model(tokens, prepend_bos=False), other(tokens).logits
    return (one.log_softmax(-1) - two.log_softmax(-1)).abs().max().item()


def their_core(sae: Any, name: str, tokens: Tensor) -> dict[str, float]:
    """SAEBench's core evaluation, in its environment."""
    from datasets import Dataset
    from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.core.main import calculate_misc_metrics, run_evals  # pyright: ignore[reportMissingImports]
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import ActivationsStore

    _, sae, _ = load_and_format_sae("local", sae, "cpu")  # hook and layer are read from where this puts them
    model = lens(name, tokens.shape[1])
    off = differing(model, name, tokens[:1])
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    store = ActivationsStore.from_sae(model, sae, data, context_size=tokens.shape[1], streaming=False, total_tokens=len(tokens))
    batches = len(tokens) // PROMPTS  # all of them: the store goes on after its reset, and so comes to the same tokens a second time
    everything = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
    config = CoreEvalConfig(
        batch_size_prompts=PROMPTS,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        exclude_special_tokens_from_reconstruction=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        **{f"compute_{which}": True for which in everything},
    )
    found, of_latents = run_evals(sae, store, model, config, ignore_tokens=special(model.tokenizer))
    flat = {figure: value for group in found.values() for figure, value in group.items()}
    return {**flat, **calculate_misc_metrics(of_latents), "log_probabilities_differ_by": off}


def their_meta_structure(sae: Any, steps: int, seed: int) -> dict[str, float]:
    """SAEBench's critic on the decoder, in its environment; it seeds torch alone, and autocast slows a CPU tenfold."""
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.meta_structure.main import run_eval_single_sae  # pyright: ignore[reportMissingImports]

    torch.manual_seed(seed)
    config = MetaStructureEvalConfig(random_seed=seed, train_steps=steps, autocast=False)
    found = run_eval_single_sae("local", "local", sae, config, "cpu").eval_result_metrics.meta_structure
    return {name: getattr(found, name) for name in ("decoder_fraction_variance_explained", "final_reconstruction_mse")}


def theirs(folder: str, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What SAEBench finds, in its environment."""
    from sae_lens import SAE

    found: dict[str, dict[str, float]] = {}
    for name in given.evals:
        sae, began = SAE.load_from_disk(folder), time.process_time()
        if name == "core":
            found[name] = their_core(sae, given.model, load_file(given.alone)["tokens"].long())
        else:
            found[name] = their_meta_structure(sae, given.steps, given.seed)
        found[name]["cpu_seconds"] = time.process_time() - began
    return found


def asked(folder: Path, model: str, tokens: Tensor, given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What `theirs` says in that environment."""
    with tempfile.TemporaryDirectory() as temporary:
        file = f"{temporary}/tokens.safetensors"
        save_file({"tokens": tokens.int().contiguous()}, file)
        command = [given.saebench, __file__, str(folder), "--alone", file, "--model", model, "--evals", *given.evals]
        command += ["--steps", str(given.steps), "--seed", str(given.seed)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().split("\n")[-1])


def held_out(one: Any, wanted: int) -> tuple[Any, Tensor]:
    """The SAE's language model, and contexts of its held-out tokens, in full batches."""
    from metasae_lightning.cli.arguments import data_for
    from metasae_lightning.evaluation import held_out_text
    from metasae_lightning.evaluation.saes import select_hook

    data = data_for(one, argparse.Namespace(data=None, device="cpu"))
    if getattr(data, "language_model", None) is None:
        raise SystemExit(f"{one.place} reads planted activations: SAEBench's core evaluation needs a language model")
    data.language_model.dtype = torch.float32
    select_hook(one, data)
    data.setup("test")
    contexts, count = [], 0
    for passage in held_out_text.passages(
        held_out_text.held_out(data, "test", 2 * wanted), 2 * wanted
    ):  # rows that count are fewer than tokens
        contexts.append(passage.tokens)
        count += passage.tokens.numel()
        if count >= wanted:
            break
    tokens = torch.cat(contexts)
    batches = min(max(1, wanted // (PROMPTS * tokens.shape[1])), len(tokens) // PROMPTS)
    if not batches:
        raise SystemExit(f"{one.place}: the held-out text has {len(tokens)} contexts, and a batch is {PROMPTS}")
    return data.language_model, tokens[: batches * PROMPTS]


@torch.no_grad()
def our_core(one: Any, model: Any, tokens: Tensor) -> dict[str, float]:
    """The core figures by this project's formulas, on the same tokens."""
    from metasae_lightning import functional
    from metasae_lightning.metrics import DeadLatents, Reconstruction

    width, d_in = one.W_dec.shape
    complete, read = model.complete(), []
    metric, dead = Reconstruction(d_in), DeadLatents(width)
    left_out = torch.tensor(sorted(special(model.tokenizer)))
    losses: list[Tensor] = []
    kl: list[Tensor] = []
    legacy: list[Tensor] = []
    squares: list[Tensor] = []
    errors: list[Tensor] = []
    for batch in tokens.split(PROMPTS):
        counted = ~torch.isin(batch, left_out)

        def kept(found: Tensor, read: list[Tensor] = read) -> Tensor:
            read[:] = [found]
            return found

        def rebuilt(found: Tensor, counted: Tensor = counted) -> Tensor:
            return found.index_put((counted,), one.rebuild(found[counted]))

        after = batch[:, 1:]
        clean = complete.logits(batch, edit=kept)
        spliced = complete.logits(batch, edit=rebuilt)
        zero = complete.logits(batch, edit=torch.zeros_like)
        # A prediction counts where the token that it is made at does.
        ce = [functional.cross_entropy(logits[:, :-1], after)[counted[:, :-1]] for logits in (clean, spliced, zero)]
        losses.append(torch.stack(ce).double())
        kl.append(functional.kl_divergence(clean, spliced)[counted].double())
        x = read[0][counted]
        codes, reconstruction = one.encode_decode(x)
        metric.update(x, reconstruction, codes)
        dead.update(codes)
        error, spread = (x - reconstruction).double().square().sum(1), (x - x.mean(0)).double().square().sum(1)
        legacy.append(1 - error / spread)
        squares.append(x.double().square().sum(1).mean())
        errors.append(error.mean())
    found = {name: value.item() for name, value in metric.compute().items()}
    clean, sae, zero = torch.cat(losses, 1).mean(1).tolist()
    square = torch.stack(squares).mean()
    return {
        **{**found, "explained_variance": 1 - found["fvu"], "explained_variance_legacy": torch.cat(legacy).mean().item()},
        "by_its_formula": (1 - torch.stack(errors).mean() / (square - (square / d_in).square())).item(),
        **{"alive": 1 - dead.compute()["dead"].item(), "nearest_mean": functional.nearest_cosines(one.W_dec).mean().item()},
        **{"ce_clean": clean, "ce_sae": sae, "ce_zero": zero, "recovered_zero": (zero - sae) / (zero - clean)},
        "kl": torch.cat(kl).mean().item(),
    }


def our_meta_structure(one: Any, steps: int, seed: int) -> dict[str, float]:
    """The project's critic on the decoder's directions."""
    from metasae_lightning.functional import unit_rows
    from metasae_lightning.metrics import Decomposition

    return {"fve": Decomposition(steps=steps).variance_explained(unit_rows(one.W_dec), seed)}


def table(lines: tuple[tuple[str, str], ...], theirs: dict[str, float], ours: dict[str, float]) -> None:
    """Print figures side by side."""
    print(f"  {'SAEBench calls it':32}{'SAEBench':>12}{'here':>12}  here it is")
    for one, two in lines:
        print(f"  {one:32}{theirs[one]:>12.5g}{ours[two]:>12.5g}  {two}", flush=True)


def main() -> None:
    """Run SAEBench on the SAE, the same here, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", help="a SAELens folder, or a run", metavar="SAE_FOLDER")
    parser.add_argument("--saebench", help="the interpreter of SAEBench's environment", metavar="PYTHON")
    parser.add_argument("--evals", nargs="+", choices=EVALS, default=list(EVALS))
    parser.add_argument("--tokens", type=int, default=4096, help=f"of the core evaluation, in batches of {PROMPTS} contexts")
    parser.add_argument("--steps", type=int, default=1500, help="of the critic")
    parser.add_argument("--seed", type=int, default=0, help="of the critic")
    parser.add_argument("--out", type=Path, help="everything as JSON", metavar="FILE")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(theirs(given.sae, given)))
        return
    if not given.saebench:
        parser.error("--saebench is needed: the interpreter of SAEBench's environment")
    from metasae_lightning.evaluation.saes import load_sae
    from metasae_lightning.lm.embedded_model import EMBEDDED, embedded_folder

    one = load_sae(given.sae)
    folder = (Path(one.place) / "saes" / "primary" if one.run else Path(one.place)).resolve()
    model, tokens = held_out(one, given.tokens) if "core" in given.evals else (None, torch.zeros(0, 1))
    name = "" if model is None else str(embedded_folder()) if model.name == EMBEDDED else model.name
    print(f"{described()}\n{folder}", flush=True)
    found = asked(folder, name, tokens, given)
    ours: dict[str, dict[str, float]] = {}
    if "core" in given.evals:
        ours["core"] = our_core(one, model, tokens)
        off = found["core"]["log_probabilities_differ_by"]
        print(f"core, {tokens.numel():,} tokens in {len(tokens)} contexts; log-probabilities are within {off:.1g} of transformers'")
        table(CORE, found["core"], ours["core"])
    if "meta_structure" in given.evals:
        ours["meta_structure"] = our_meta_structure(one, given.steps, given.seed)
        print(f"meta_structure, {len(one.W_dec):,} rows, {given.steps:,} steps")
        table(META, found["meta_structure"], ours["meta_structure"])
    print("CPU seconds of SAEBench's: " + ", ".join(f"{name} {figures['cpu_seconds']:.0f}" for name, figures in found.items()))
    if given.out:
        record = {"sae": str(folder), "tokens": tokens.numel(), "steps": given.steps, "seed": given.seed}
        given.out.write_text(json.dumps({**record, "saebench": found, "here": ours}, indent=1) + "\n")


if __name__ == "__main__":
    main()

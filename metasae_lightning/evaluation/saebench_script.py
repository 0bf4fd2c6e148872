"""One of SAEBench's evaluations of an SAE folder. SAEBench's Python runs this script, which imports nothing of this package.

SAEBench's own commands accept only names on the Hub. Its functions accept a loaded SAE, a model and a store of tokens.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Contexts in one forward pass.
PROMPTS = 8


@dataclass(frozen=True)
class Job:
    """One evaluation of one SAE; the script gets it as JSON."""

    evaluation: str
    """`core` or `meta_structure`."""
    sae: str
    """The SAELens folder."""
    release: str
    """The SAE's name in the results."""
    out: str
    """The JSON file of the results."""
    model: str = ""
    """Hub name or folder of the language model, for `core`."""
    tokens: str = ""
    """The safetensors file of the contexts, for `core`."""
    steps: int = 1500
    """Training steps of the meta SAE, for `meta_structure`."""
    seed: int = 0
    """Seed of the meta SAE's training."""


def special_tokens(tokenizer: Any) -> set[int]:
    """The tokens that SAEBench's command leaves out of the core evaluation."""
    return {token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if token is not None}


def hooked_transformer(name: str, n_ctx: int) -> Any:
    """TransformerLens's model from a Hub name or a local folder, without weight processing. Its own `from_pretrained` accepts no folder."""
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
def largest_difference(model: Any, name: str, tokens: torch.Tensor) -> float:
    """The largest absolute difference between a log-probability of `model` and that of transformers' model."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    logits, reference_logits = model(tokens, prepend_bos=False), reference(tokens).logits
    return (logits.log_softmax(-1) - reference_logits.log_softmax(-1)).abs().max().item()


def core(job: Job) -> None:
    """Run the core evaluation on the CPU, on all contexts of the job."""
    from datasets import Dataset
    from sae_bench.evals.core import main as evaluation  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.sae_bench_utils import get_eval_uuid, get_sae_lens_version  # pyright: ignore[reportMissingImports]
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import SAE, ActivationsStore
    from safetensors.torch import load_file

    tokens = load_file(job.tokens)["tokens"].long()
    _, sae, _ = load_and_format_sae("local", SAE.load_from_disk(job.sae), "cpu")  # sets the hook and the layer that `run_evals` reads
    model = hooked_transformer(job.model, tokens.shape[1])
    difference = largest_difference(model, job.model, tokens[:1])
    print(f"{job.model}: log-probabilities differ from transformers' by at most {difference:.1g}")
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    store = ActivationsStore.from_sae(model, sae, data, context_size=tokens.shape[1], streaming=False, total_tokens=len(tokens))
    # The store's reset does not restart it, so the second evaluation has the same tokens only if the first has read all batches.
    batches = len(tokens) // PROMPTS
    config = CoreEvalConfig(
        model_name=job.model,
        llm_dtype="float32",
        context_size=tokens.shape[1],
        dataset=str(sae.cfg.metadata.dataset_path or ""),
        batch_size_prompts=PROMPTS,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        exclude_special_tokens_from_reconstruction=True,
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        **{f"compute_{metric}": True for metric in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")},
    )
    figures, latents = evaluation.run_evals(sae, store, model, config, ignore_tokens=special_tokens(model.tokenizer))
    figures["misc_metrics"] = evaluation.calculate_misc_metrics(latents)
    names = {"unique_id": job.release, "sae_set": job.release, "sae_id": "local"}
    result = evaluation.replace_nans_with_negative_one({**names, "eval_cfg": config, "metrics": figures, "feature_metrics": latents})
    evaluation.save_single_eval_result(result, get_eval_uuid(), get_sae_lens_version(), "Unknown", job.out, sae)


def meta_structure(job: Job) -> None:
    """Train SAEBench's meta SAE on the decoder. SAEBench itself seeds only torch. Autocast is off: it is ten times slower on a CPU."""
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig  # pyright: ignore[reportMissingImports]
    from sae_bench.evals.meta_structure.main import run_eval_single_sae  # pyright: ignore[reportMissingImports]
    from sae_lens import SAE

    torch.manual_seed(job.seed)
    config = MetaStructureEvalConfig(random_seed=job.seed, train_steps=job.steps, autocast=False)
    run_eval_single_sae(job.release, "local", SAE.load_from_disk(job.sae), config, "cpu").to_json_file(job.out, indent=2)


EVALUATIONS = {"core": core, "meta_structure": meta_structure}


def main() -> int:
    """Run the job in the first argument. An exception is written in one line to the file `OUT.error`; METASAE_DEBUG shows its traceback."""
    job = Job(**json.loads(sys.argv[1]))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            EVALUATIONS[job.evaluation](job)
    except Exception as error:
        if os.environ.get("METASAE_DEBUG"):
            raise
        Path(f"{job.out}.error").write_text(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", encoding="utf-8")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tokens per second of `metasae fit` and of SAELens's training runner: same model, hook, widths and tokens, the embedded model and text.

    python benchmarks/end_to_end.py                      # d_sae 4608 and 18432, solo, a process each in turn
    python benchmarks/end_to_end.py --widths 4608 --runs 1 --tokens 40960

Time is counted between two moments when the buffer has just been filled, the first after five steps and the last of the run: as many tokens
went through the language model as were trained on, and nothing of what is loaded before or saved after counts. The parts are the language
model's forward pass, which ends at the hook in both, and the SAE's step; the rest is text, shuffling and the loop.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from machine import described, draw

HOOK, LAYER, CONTEXT, BATCH, K, BUFFER = "blocks.15.hook_resid_post", 15, 128, 1024, 32, 16384
FIRST = 5


class Watch:
    """When steps began and ended, and what the parts took between the first that counts and the last."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.model: list[tuple[float, float]] = []

    def over(self, owner: Any, name: str, kept: list[tuple[float, float]]) -> None:
        """Have a method's calls noted."""
        plain = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = plain(*args, **kwargs)
            kept.append((began, time.perf_counter()))
            return result

        setattr(owner, name, noted)

    def figures(self, batch: int) -> dict[str, float]:
        """Tokens per second and shares, between the first and the last moment at which a full buffer goes back to training."""
        events = sorted([(end, "step") for _, end in self.steps] + [(end, "model") for _, end in self.model])
        pairs = list(pairwise(events))[FIRST:]
        filled = [
            end for (end, kind), (_, following) in pairs if kind == "model" and following == "step" and end > self.steps[FIRST - 1][1]
        ]
        begin, end = filled[0], filled[-1]
        step, model = ([b - a for a, b in calls if a >= begin and b <= end] for calls in (self.steps, self.model))
        whole = end - begin
        return {"tokens_per_second": len(step) * batch / whole, "model": sum(model) / whole, "step": sum(step) / whole}


def ours(width: int, tokens: int, folder: str) -> Watch:
    """`metasae fit` of the quickstart recipe, solo, without what is done before and after training."""
    from metasae_lightning.cli import main
    from metasae_lightning.lm import HuggingFaceLM
    from metasae_lightning.memory.malloc import keep_freed_blocks
    from metasae_lightning.training import JointSAE

    keep_freed_blocks()  # as the command does for a process of its own
    watch = Watch()
    watch.over(JointSAE, "step", watch.steps)
    watch.over(HuggingFaceLM, "activations", watch.model)
    data = {"tokens": tokens, "batch_size": BATCH, "buffer_size": BUFFER, "validation_tokens": BATCH, "test_tokens": BATCH}
    settings = [f"--data.init_args.{name}={value}" for name, value in data.items()]
    settings += [
        f"--model.init_args.primary.init_args.d_sae={width}",
        "--data.init_args.skip_positions=0",
        "--arms=null",
        "--data.init_args.max_norm_ratio=null",
    ]
    main(["fit", "-c", "quickstart", "-c", "solo", "--run", f"{folder}/run", *settings])
    return watch


def saelens(width: int, tokens: int, folder: str) -> Watch:
    """SAELens's runner on the same model from the same files."""
    import datasets
    import torch
    from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.sae_trainer import SAETrainer

    from metasae_lightning.corpora import PythonDocs
    from metasae_lightning.lm.embedded_model import embedded_folder

    watch = Watch()
    watch.over(SAETrainer, "step", watch.steps)
    watch.over(ActivationsStore, "get_raw_llm_batch", watch.model)
    text = datasets.Dataset.from_dict({"text": list(islice(PythonDocs().documents(seed=0), tokens // 40))})
    cfg: Any = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(d_in=576, d_sae=width, k=K, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=False),
        model_name=str(embedded_folder()), model_class_name="AutoModelForCausalLM", hook_name=f"model.layers.{LAYER}",
        exclude_special_tokens=True,  # as ours: BOS and EOS go through the model and are not trained on
        dataset_path="given", streaming=False, context_size=CONTEXT, training_tokens=tokens, train_batch_size_tokens=BATCH,
        store_batch_size_prompts=32, n_batches_in_buffer=BUFFER // CONTEXT, lr=2e-3, device="cpu", n_checkpoints=0,
        checkpoint_path=None, output_path=None, save_final_checkpoint=False, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    model = load_model("AutoModelForCausalLM", str(embedded_folder()), "cpu", {"dtype": torch.float32})
    LanguageModelSAETrainingRunner(cfg, override_dataset=text, override_model=model).run()
    return watch


ARMS = {"ours": ours, "saelens": saelens}


def alone(arm: str, width: int, tokens: int) -> dict[str, float]:
    """A run in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--widths", str(width), "--tokens", str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().split("\n")[-1])


def main() -> None:
    """Run, print and keep the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[4608, 18432])
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/end_to_end.csv"))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.arm:
        with tempfile.TemporaryDirectory() as folder:
            found = ARMS[given.arm](given.widths[0], given.tokens, folder).figures(BATCH)
        print("\n" + json.dumps(found))
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{described()}, fp32: {given.tokens:,} tokens a run, medians of {given.runs} runs of each in turn")
    with given.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["d_sae", "arm", "tokens_per_second", "model", "step", "rest"])
        bars: dict[str, float] = {}
        for width in given.widths:
            runs = [{arm: alone(arm, width, given.tokens) for arm in ARMS} for _ in range(given.runs)]
            for arm in ARMS:
                middle = {part: statistics.median(run[arm][part] for run in runs) for part in runs[0][arm]}
                bars[f"{width}, {arm}"] = middle["tokens_per_second"]
                rest = 1 - middle["model"] - middle["step"]
                table.writerow(
                    [width, arm, round(middle["tokens_per_second"], 1), *(round(middle[p], 4) for p in ("model", "step")), round(rest, 4)]
                )
                shares = f"model {middle['model']:.0%}, SAE {middle['step']:.0%}, rest {rest:.0%}"
                print(f"d_sae {width:6}  {arm:8} {middle['tokens_per_second']:8,.0f} tokens/s  ({shares})", flush=True)
            ratios = [run["ours"]["tokens_per_second"] / run["saelens"]["tokens_per_second"] for run in runs]
            print(f"d_sae {width:6}  ours / saelens {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    draw(given.out.with_suffix(".svg"), f"end to end: {described()}", list(bars), list(bars.values()), "tokens per second")


if __name__ == "__main__":
    main()

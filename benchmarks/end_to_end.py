"""Tokens per second of `metasae fit` and of SAELens's training runner: same model, hook, widths and tokens, the embedded model and text.

    python benchmarks/end_to_end.py                      # d_sae 4608 and 18432, solo, a process each in turn
    python benchmarks/end_to_end.py --widths 4608 --runs 1 --tokens 40960

Time is measured between two moments at which the buffer has just been filled: the first after five steps, and the last of the run. Between
them as many tokens go through the language model as are trained on, and neither loading nor saving is included. The parts are the language
model's forward pass, which ends at the hook in both programs, and the SAE's step; the rest is text, shuffling and the loop.
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

from machine import machine_description, save_bar_chart

HOOK, LAYER, CONTEXT, BATCH, K, BUFFER = "blocks.15.hook_resid_post", 15, 128, 1024, 32, 16384
WARM_UP_STEPS = 5


class CallTimer:
    """Start and end of every step and of every forward pass of the language model."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self.model: list[tuple[float, float]] = []

    def record_calls(self, owner: Any, name: str, calls: list[tuple[float, float]]) -> None:
        """Replace a method by one that appends the start and end of each call to `calls`."""
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **kwargs)
            calls.append((start, time.perf_counter()))
            return result

        setattr(owner, name, timed)

    def figures(self, batch: int) -> dict[str, float]:
        """Tokens per second, and fractions of the time, between the first and the last refill of the buffer that counts."""
        events = sorted([(end, "step") for _, end in self.steps] + [(end, "model") for _, end in self.model])
        pairs = list(pairwise(events))[WARM_UP_STEPS:]
        warm = self.steps[WARM_UP_STEPS - 1][1]
        refills = [end for (end, kind), (_, next_kind) in pairs if kind == "model" and next_kind == "step" and end > warm]
        begin, end = refills[0], refills[-1]
        step, model = ([b - a for a, b in calls if a >= begin and b <= end] for calls in (self.steps, self.model))
        seconds = end - begin
        return {"tokens_per_second": len(step) * batch / seconds, "model": sum(model) / seconds, "step": sum(step) / seconds}


def ours(width: int, tokens: int, folder: str) -> CallTimer:
    """`metasae fit` of the quickstart recipe, solo, without the work before and after training."""
    from metasae_lightning.cli import main
    from metasae_lightning.lm import HuggingFaceLM
    from metasae_lightning.memory.malloc import keep_freed_blocks
    from metasae_lightning.training import JointSAE

    keep_freed_blocks()  # as the command does in its own process
    timer = CallTimer()
    timer.record_calls(JointSAE, "step", timer.steps)
    timer.record_calls(HuggingFaceLM, "activations", timer.model)
    data = {"tokens": tokens, "batch_size": BATCH, "buffer_size": BUFFER, "validation_tokens": BATCH, "test_tokens": BATCH}
    settings = [f"--data.init_args.{name}={value}" for name, value in data.items()]
    settings += [
        f"--model.init_args.primary.init_args.d_sae={width}",
        "--data.init_args.skip_positions=0",
        "--arms=null",
        "--data.init_args.max_norm_ratio=null",
    ]
    main(["fit", "-c", "quickstart", "-c", "solo", "--run", f"{folder}/run", *settings])
    return timer


def saelens(width: int, tokens: int, folder: str) -> CallTimer:
    """SAELens's training runner, on the same model from the same files."""
    import datasets
    import torch
    from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore
    from sae_lens.training.sae_trainer import SAETrainer

    from metasae_lightning.corpora import PythonDocs
    from metasae_lightning.lm.embedded_model import embedded_folder

    timer = CallTimer()
    timer.record_calls(SAETrainer, "step", timer.steps)
    timer.record_calls(ActivationsStore, "get_raw_llm_batch", timer.model)
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
    return timer


ARMS = {"ours": ours, "saelens": saelens}


def run_in_subprocess(arm: str, width: int, tokens: int) -> dict[str, float]:
    """The figures of a run in its own process."""
    command = [sys.executable, __file__, "--arm", arm, "--widths", str(width), "--tokens", str(tokens)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        sys.exit(process.stderr)
    return json.loads(process.stdout.strip().split("\n")[-1])


def main() -> None:
    """Run the benchmark, print the results and write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[4608, 18432])
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/end_to_end.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.arm:
        with tempfile.TemporaryDirectory() as folder:
            figures = ARMS[args.arm](args.widths[0], args.tokens, folder).figures(BATCH)
        print("\n" + json.dumps(figures))
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine_description()}, fp32: {args.tokens:,} tokens a run, medians of {args.runs} runs of each in turn")
    with args.out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["d_sae", "arm", "tokens_per_second", "model", "step", "rest"])
        bars: dict[str, float] = {}
        for width in args.widths:
            runs = [{arm: run_in_subprocess(arm, width, args.tokens) for arm in ARMS} for _ in range(args.runs)]
            for arm in ARMS:
                medians = {part: statistics.median(run[arm][part] for run in runs) for part in runs[0][arm]}
                bars[f"{width}, {arm}"] = medians["tokens_per_second"]
                rest = 1 - medians["model"] - medians["step"]
                table.writerow(
                    [width, arm, round(medians["tokens_per_second"], 1), *(round(medians[p], 4) for p in ("model", "step")), round(rest, 4)]
                )
                shares = f"model {medians['model']:.0%}, SAE {medians['step']:.0%}, rest {rest:.0%}"
                print(f"d_sae {width:6}  {arm:8} {medians['tokens_per_second']:8,.0f} tokens/s  ({shares})", flush=True)
            ratios = [run["ours"]["tokens_per_second"] / run["saelens"]["tokens_per_second"] for run in runs]
            print(f"d_sae {width:6}  ours / saelens {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    save_bar_chart(
        args.out.with_suffix(".svg"), f"end to end: {machine_description()}", list(bars), list(bars.values()), "tokens per second"
    )


if __name__ == "__main__":
    main()

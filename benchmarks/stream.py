"""Tokens per second of the activation stream, the bare model's forward pass and SAELens's ActivationsStore.

    python benchmarks/stream.py                   # five alternating runs of each in one process, then a process of each for its memory
    python benchmarks/stream.py --passes 4 --runs 1

The model is the embedded one, the text is the documentation of the installed packages. Every arm runs the same number of contexts.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from machine import machine_description, peak_mib

from metasae_lightning.corpora import InMemory, PythonDocs
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.data.shuffle import batch_moves, permutation
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.lm.embedded_model import embedded_folder

HOOK, LAYER, CONTEXT, PASS, BATCH, BUFFER = "blocks.15.hook_resid_post", 15, 128, 32, 1024, 8192


class Bench:
    """The arms, on one model and one text. Each returns the seconds of `passes` forward passes of 32 x 128 tokens."""

    def __init__(self, passes: int):
        self.passes = passes
        self.tokens = passes * PASS * CONTEXT
        self.corpus = InMemory(list(islice(PythonDocs().documents(seed=0), self.tokens // 60)))
        self.lm = HuggingFaceLM("smollm2-135m-instruct", HOOK, device="cpu")
        self.lm.load()
        self.store: Any = None

    def stream(self, **batching_args: Any) -> ActivationStream:
        """The activation stream with the quickstart's sizes, except for a buffer that two forward passes fill."""
        batching = Batching(batch_size=BATCH, context_size=CONTEXT, buffer_size=BUFFER, held_out=0.0, forward_batch=PASS, **batching_args)
        return ActivationStream(self.corpus, self.lm, batching, StreamSlice("train", 10**9))

    def contexts(self) -> list[torch.Tensor]:
        """The tokens of each forward pass, prepared beforehand."""
        rows = self.stream().row_reader()
        passes = [rows.next_pass() for _ in range(self.passes)]
        rows.close()
        return [tokens for tokens, _ in filter(None, passes)]

    def bare(self) -> float:
        """The forward pass of transformers through the same layers on the same tokens, whose activations are discarded."""
        contexts, model = self.contexts(), self.lm._root.model
        start = time.perf_counter()
        with torch.no_grad():
            for tokens in contexts:
                model(tokens)
        return time.perf_counter() - start

    def ours(self, **batching_args: Any) -> float:
        """Batches of the activation stream, for the same number of forward passes."""
        n_passes, activations = 0, self.lm.activations

        def counted(*args: Any) -> torch.Tensor:
            nonlocal n_passes
            n_passes += 1
            return activations(*args)

        self.lm.activations = counted  # type: ignore[method-assign]
        # The number of trainable rows of a pass varies a little, so the time for a number of rows is scaled to the number of passes.
        rows = self.tokens * 127 // 128 - BUFFER
        start = time.perf_counter()
        iterator = iter(self.stream(**batching_args))
        for _ in islice(iterator, rows // BATCH):
            pass
        seconds = time.perf_counter() - start
        iterator.close()
        self.lm.activations = activations  # type: ignore[method-assign]
        return seconds * self.passes / n_passes

    def ours_across(self) -> float:
        """The activation stream with attention across documents, as in SAELens."""
        return self.ours(cross_document_attention=True)

    def text(self) -> float:
        """Reading, tokenising, packing and masks alone, which run on another thread than the model."""
        start = time.perf_counter()
        self.contexts()
        return time.perf_counter() - start

    def shuffle(self) -> float:
        """The reads and writes of the shuffle buffer alone, for the same rows."""
        total = self.tokens // BATCH * BATCH
        buffer, rows = torch.empty(BUFFER, self.lm.d_model), torch.randn(BATCH, self.lm.d_model)
        start = time.perf_counter()
        for move in batch_moves(BUFFER, total, batch_size=BATCH, order=lambda block, length: permutation(str(block), length)):
            buffer.index_select(0, move.batch_slots)
            buffer.index_copy_(0, move.refill_slots, rows[: len(move.refill_slots)])
        return time.perf_counter() - start

    def saelens(self) -> float:
        """SAELens's ActivationsStore with a buffer of the same size, iterated as its trainer does."""
        import datasets
        from sae_lens.load_model import load_model
        from sae_lens.training.activations_store import ActivationsStore

        if self.store is None:
            hook = f"model.layers.{LAYER}"
            model = load_model("AutoModelForCausalLM", str(embedded_folder()), "cpu", {"dtype": torch.float32})
            self.store = ActivationsStore(
                model=model, dataset=datasets.Dataset.from_dict({"text": self.corpus.all_documents * 20}), streaming=False, hook_name=hook,
                hook_head_index=None, context_size=CONTEXT, d_in=576, n_batches_in_buffer=BUFFER // CONTEXT,
                total_training_tokens=10**9, store_batch_size_prompts=PASS, train_batch_size_tokens=BATCH, prepend_bos=True,
                normalize_activations="none", device=torch.device("cpu"), dtype="float32",
            )  # fmt: skip
            next(self.store)  # fills its buffer
        n_passes, get_raw_llm_batch = 0, self.store.get_raw_llm_batch

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_passes
            n_passes += 1
            return get_raw_llm_batch(*args, **kwargs)

        self.store.get_raw_llm_batch = counted
        start = time.perf_counter()
        while n_passes < self.passes:
            next(self.store)
        seconds = time.perf_counter() - start
        self.store.get_raw_llm_batch = get_raw_llm_batch
        return seconds * self.passes / n_passes


ARMS = ("bare", "ours", "ours_across", "saelens", "text", "shuffle")


def run_in_subprocess(arm: str, passes: int) -> dict[str, float]:
    """The seconds and the peak resident size of an arm in its own process."""
    process = subprocess.run([sys.executable, __file__, "--arm", arm, "--passes", str(passes)], capture_output=True, text=True, check=True)
    return json.loads(process.stdout.strip().split("\n")[-1])


def main() -> None:
    """Run the benchmark, print the results and write them to a CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/stream.csv"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    bench = Bench(args.passes)
    if args.arm:
        seconds = getattr(bench, args.arm)()
        print(json.dumps({"seconds": seconds, "mib": peak_mib()}))
        return
    arms: dict[str, Callable[[], float]] = {name: getattr(bench, name) for name in ARMS}
    bench.bare()  # warm-up: the first run allocates memory and starts threads
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for run in range(args.runs):
        for name, arm in arms.items():
            seconds[name].append(arm())
        print(f"run {run + 1}: { ({name: round(times[-1], 2) for name, times in seconds.items()}) }", flush=True)
    memory = {name: run_in_subprocess(name, args.passes)["mib"] for name in ("bare", "ours", "saelens")}
    report(bench.tokens, seconds, memory, args.out)


def report(tokens: int, seconds: dict[str, list[float]], memory: dict[str, float], out: Path) -> None:
    """Print the table and write it to the CSV file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{machine_description()}: {tokens:,} tokens a run, medians of {len(seconds['bare'])} alternating runs")
    with out.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["arm", "tokens_per_second", "of_bare", "lowest", "highest", "peak_mib"])
        for name, times in seconds.items():
            ratios = [bare / arm for bare, arm in zip(seconds["bare"], times, strict=True)]
            row = [name, round(tokens / statistics.median(times), 1), round(statistics.median(ratios), 4), round(min(ratios), 4)]
            row += [round(max(ratios), 4), round(memory[name]) if name in memory else ""]
            table.writerow(row)
            peak = f", peak {memory[name]:,.0f} MiB" if name in memory else ""
            print(f"{name:12} {row[1]:12,.0f} tokens/s   {row[2]:8.3f} of bare ({row[3]:.3f} to {row[4]:.3f}){peak}")


if __name__ == "__main__":
    main()

"""Memory that loading a language model only up to its hook saves, and memory of a stream over many refills of its buffer.

    python benchmarks/memory.py            # GPT-2 large's architecture with random weights, layer 20 of 36; needs 4 GB of disk

Each figure is the peak resident size of a separate process.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from itertools import islice

import psutil
import torch
from machine import peak_mib
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from metasae_lightning.corpora import InMemory, PythonDocs
from metasae_lightning.data.activation_stream import ActivationStream
from metasae_lightning.data.batching import Batching, StreamSlice
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.lm.embedded_model import embedded_folder

LARGE = {"n_embd": 1280, "n_layer": 36, "n_head": 20}
MIB = 2**20


def make(folder: str) -> None:
    """Write a model with GPT-2 large's shapes. The tokenizer may be any with fewer tokens."""
    GPT2LMHeadModel(GPT2Config(**LARGE)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded_folder()).save_pretrained(folder)


def tokens() -> torch.Tensor:
    """The tokens of one forward pass of the recipe."""
    return torch.arange(32 * 128).view(32, 128) % 50_000


def empty(_: str) -> None:
    """Import the libraries only."""


def whole(folder: str) -> None:
    """Load the whole model with transformers, and make a forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.transformer(tokens())


def hooked(folder: str) -> None:
    """Load the model with this project, up to layer 20, and make a forward pass."""
    model = HuggingFaceLM(folder, "blocks.20.hook_resid_pre", device="cpu")
    model.load()
    model.activations(tokens())


def refills(_: str) -> dict[str, float]:
    """A SmolLM2 stream over 51 refills of its buffer: size of the buffer, and resident size of the process early and late, in MiB."""
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.2.hook_resid_post", device="cpu")
    model.load()
    batching = Batching(batch_size=1024, context_size=128, buffer_size=8192)
    corpus = InMemory(list(islice(PythonDocs().documents(seed=0), 4000)))
    stream = ActivationStream(corpus, model, batching, StreamSlice("train", 10**9))
    batches, sizes, buffers = iter(stream), list[float](), set[tuple[int, int]]()
    for _ in range(52):
        for _ in islice(batches, 8):
            pass
        gc.collect()
        buffer = stream._buffer_state["buffer"]
        buffers.add((buffer.data_ptr(), buffer.untyped_storage().nbytes()))
        sizes.append(psutil.Process().memory_info().rss / MIB)
    batches.close()
    ((_, buffer_bytes),) = buffers  # one allocation for all refills
    early, late = statistics.median(sizes[1:11]), statistics.median(sizes[-10:])
    return {"buffer": buffer_bytes / MIB, "early": early, "late": late, "least": min(sizes[1:]), "most": max(sizes[1:])}


CASES = {"empty": empty, "whole": whole, "hooked": hooked, "refills": refills}
PARTS = {"make": make, **CASES}


def run_in_subprocess(case: str, folder: str) -> dict[str, float]:
    """The figures of a case in its own process."""
    command = [sys.executable, __file__, "--case", case, "--folder", folder]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(process.stdout.strip().split("\n")[-1])


def main() -> None:
    """Run all cases and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=PARTS)
    parser.add_argument("--folder", default="")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.case:
        figures = PARTS[args.case](args.folder) or {}
        print(json.dumps({**figures, "peak": peak_mib()}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        if not args.folder:
            run_in_subprocess("make", folder)
        results = {case: run_in_subprocess(case, folder) for case in CASES}
    results["of_whole"] = {"peak": results["hooked"]["peak"] / results["whole"]["peak"]}
    print(json.dumps(results))


if __name__ == "__main__":
    main()

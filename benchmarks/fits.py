"""The memory plans of the paper's runs, and of a million latents, as a Markdown table. No weights are loaded and no GPU is needed.

    python benchmarks/fits.py               # four minutes of one core; docs/scaling.md has the table
    python benchmarks/fits.py --lines       # also every line of each plan

A plan is the one that `metasae fit` computes before it loads a model, for GPUs that this machine need not have.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import yaml
from sae_lens import BatchTopKTrainingSAEConfig
from transformers import Gemma2Config, GPT2Config, PretrainedConfig

import metasae_lightning
from metasae_lightning import ActivationsDataModule, JointSAE
from metasae_lightning.corpora import InMemory
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.lm import device as lm_device
from metasae_lightning.memory.plan import memory_plan
from metasae_lightning.memory.table import GIB, MemoryPlan
from metasae_lightning.penalties import Decomposability

RECIPES = Path(metasae_lightning.__file__).parent / "configs"
# Sizes from the models' configs on the Hub. The Hub serves the second only to those who accepted its licence.
GPT2_LARGE = GPT2Config(n_embd=1280, n_layer=36, n_head=20, vocab_size=50257, n_positions=1024)
GEMMA_2_9B = Gemma2Config(
    **{"hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
    **{"num_hidden_layers": 42, "vocab_size": 256_000, "sliding_window": 4096, "max_position_embeddings": 8192},
)
# Memory of GPUs in decimal gigabytes, and the memory that CUDA's context, NCCL and kernels use besides torch's tensors.
CARDS, OVERHEAD = (24, 40, 80, 141), 2 * GIB
RANKS = 8


@dataclass(frozen=True)
class Case:
    """A recipe, with changes to its model."""

    name: str
    recipe: str
    config: PretrainedConfig
    d_sae: int | None = None
    meta_rows: int | None = None


CASES = [
    Case("GPT-2 large, 20,480 latents", "gpt2_large_l20", GPT2_LARGE),
    Case("Gemma 2 9B, 65,536 latents", "gemma2_9b_l23", GEMMA_2_9B),
    # A meta step on all rows would hold the pre-activations of the meta SAE's dead latents for a million rows.
    Case("Gemma 2 9B, 1,048,576 latents, meta_rows 65,536", "gemma2_9b_l23", GEMMA_2_9B, 2**20, 2**16),
]


def model_of(case: Case, tree: dict[str, Any]) -> JointSAE:
    """The recipe's SAEs on the meta device, which allocates no memory."""
    init_args = tree["model"]["init_args"]
    primary, meta = ({**init_args[role]["init_args"], "device": "meta"} for role in ("primary", "meta"))
    d_sae = case.d_sae or primary["d_sae"]
    meta["d_sae"] = meta["d_sae"] * d_sae // primary["d_sae"]  # the recipe's ratio
    primary["d_sae"] = d_sae
    penalty = Decomposability(**init_args["penalties"]["decomposability"]["init_args"])
    configs = BatchTopKTrainingSAEConfig(**primary), BatchTopKTrainingSAEConfig(**meta)
    return JointSAE(*configs, {"decomposability": penalty}, b_dec_init="zeros", meta_rows=case.meta_rows)


def data_of(case: Case, tree: dict[str, Any], folder: str, device: str, shards: int) -> ActivationsDataModule:
    """The recipe's data, with a model that is a config only. With several shards, the batch is that of one shard."""
    init_args = dict(tree["data"]["init_args"])
    init_args["batch_size"] //= shards
    case.config.save_pretrained(folder)
    model_args = {**init_args.pop("language_model")["init_args"], "name": folder, "device": device}
    return ActivationsDataModule(HuggingFaceLM(**model_args), **{**init_args, "corpus": InMemory(["none"])})


def trainer_of(tree: dict[str, Any], ranks: int, shards: int) -> Any:
    """A stand-in for a trainer, with the attributes that a plan reads."""
    devices = [torch.device("cuda", number) for number in range(ranks)]
    strategy = SimpleNamespace(root_device=devices[0], parallel_devices=devices, local_rank=0, checkpoint_io=None, shards=shards)
    precision = tree["trainer"]["precision"]
    return SimpleNamespace(strategy=strategy, precision=precision, callbacks=[], checkpoint_callbacks=[], world_size=ranks)


def plans(case: Case) -> Iterator[tuple[str, MemoryPlan]]:
    """A plan for each way to spread the case over GPUs."""
    tree = yaml.safe_load((RECIPES / f"{case.recipe}.yaml").read_text())
    layouts: list[tuple[str, str, int, int]] = [
        ("one GPU", "auto", 1, 1),
        ("two: SAEs + model", "own", 1, 1),
        (f"each of {RANKS}, ddp", "auto", RANKS, 1),
        (f"each of {RANKS}, sharded, an eighth of batch_size", "auto", RANKS, RANKS),
    ]
    for layout, device, ranks, shards in layouts:
        with tempfile.TemporaryDirectory() as folder, patch.object(lm_device, "count_gpus", lambda: 2 * RANKS):
            yield layout, memory_plan(model_of(case, tree), data_of(case, tree, folder, device, shards), trainer_of(tree, ranks, shards))


def cell(plan: MemoryPlan) -> str:
    """The peak of each GPU in GiB, the GPU of the SAEs first, and the smallest card that has as much memory."""
    peaks = [plan.peak(device) for device in sorted(plan.devices) if device != "cpu"]
    return " + ".join(f"{peak / GIB:,.1f} ({card(peak)})" for peak in peaks)


def card(peak: int) -> str:
    """The smallest card that has this much memory, in GB."""
    return next((str(size) for size in CARDS if peak + OVERHEAD <= size * 10**9), "none")


def main() -> None:
    """Print the table, each row as soon as it is computed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", action="store_true", help="Also print every line of each plan.")
    parser.add_argument("--only", type=int, nargs="*", default=range(len(CASES)), help="Numbers of the rows to compute, from 0.")
    args = parser.parse_args()
    plans_by_case = dict[str, dict[str, MemoryPlan]]()
    for case in (CASES[number] for number in args.only):
        plans_by_case[case.name] = by_layout = dict(plans(case))
        if len(plans_by_case) == 1:
            print(f"| GiB (smallest card of {', '.join(map(str, CARDS))} GB) | {' | '.join(by_layout)} |\n|---|{'---|' * len(by_layout)}")
        print(f"| {case.name} | {' | '.join(map(cell, by_layout.values()))} |", flush=True)
    for name, by_layout in plans_by_case.items():
        for layout, plan in by_layout.items():
            for reason in plan.unplanned:
                print(f"\n{name}, {layout}: not planned: {reason}")
            if args.lines:
                print(f"\n{name}, {layout}")
                for item in plan.items:
                    print(
                        f"    {item.device:7} {item.bytes / GIB:8.2f}  {item.name}{' (passes)' if item.phase else ''}: {item.explanation}"
                    )


if __name__ == "__main__":
    main()

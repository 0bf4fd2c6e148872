"""SAEBench's evaluations of an SAE, run by the Python of another environment: SAEBench 0.6 needs `datasets` before 4 and NumPy before 2."""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Tensor

from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import held_out_text, saebench_script
from metasae_lightning.evaluation.saebench_script import PROMPTS, Job
from metasae_lightning.evaluation.saes import EvaluatedSAE, select_hook
from metasae_lightning.lm.embedded_model import EMBEDDED, embedded_folder
from metasae_lightning.run_folder import exported_sae

PACKAGES = 'sae-bench==0.6.0 "datasets<4"'
ENVIRONMENT = f"python -m venv saebench && saebench/bin/pip install {PACKAGES}"
FINDS_SAEBENCH = "import importlib.util; print(importlib.util.find_spec('sae_bench') is not None)"


def saebench_python(python: str | None) -> str:
    """The path of the Python that runs SAEBench, by default this one. A Python that is missing or lacks SAEBench is an `InputError`."""
    path = shutil.which(python or sys.executable)
    if path is None:
        raise InputError(f"python: there is no Python {python}; an environment with SAEBench is made by: {ENVIRONMENT}")
    try:
        command = [path, "-I", "-c", FINDS_SAEBENCH]  # -I: this environment's PYTHONPATH does not reach the other one
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    if answer == "True":
        return path
    if answer != "False":
        raise InputError(f"python: {path} does not run as a Python")
    if python is None:
        raise InputError(
            f"python: SAEBench is not installed here; make an environment for it ({ENVIRONMENT}) and name its Python, --python"
        )
    raise InputError(f"python: SAEBench is not installed for {path}; install it by: {path} -m pip install {PACKAGES}")


def held_out_contexts(sae: EvaluatedSAE, data: Any, n_tokens: int) -> Int[Tensor, "context position"]:
    """Held-out contexts with about `n_tokens` tokens, in full batches. The data module loads its language model, in float32."""
    if getattr(data, "language_model", None) is None:
        raise InputError(
            f"{sae.source} reads planted activations, and SAEBench's core evaluation needs a language model: --evals meta_structure"
        )
    data.language_model.dtype = torch.float32
    select_hook(sae, data)
    data.setup("test")
    contexts: list[Tensor] = []
    max_tokens = 2 * n_tokens  # more than the loop below reads: it stops after n_tokens tokens
    for passage in held_out_text.passages(held_out_text.split_stream(data, "test", max_tokens), max_tokens):
        contexts.append(passage.tokens)
        if sum(part.numel() for part in contexts) >= n_tokens:
            break
    count = sum(map(len, contexts))
    if count < PROMPTS:
        raise InputError(f"{sae.source}: the held-out text has {count} contexts, and SAEBench reads {PROMPTS} at a time")
    tokens = torch.cat(contexts)
    batches = min(max(1, n_tokens // (PROMPTS * tokens.shape[1])), count // PROMPTS)
    return tokens[: batches * PROMPTS]


def model_place(model: Any) -> str:
    """The Hub name or local folder from which transformers loads a language model."""
    return str(embedded_folder()) if model.name == EMBEDDED else model.name


def run_saebench(
    python: str, sae: EvaluatedSAE, evaluation: str, *, model: str = "", tokens: Tensor | None = None, steps: int = 1500, seed: int = 0
) -> bytes:
    """The JSON of one evaluation by SAEBench: `core`, which needs `model` and `tokens`, or `meta_structure`.

    A failed evaluation is an `InputError` with SAEBench's own message.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        contexts = f"{folder}/tokens.safetensors" if tokens is not None else ""
        if tokens is not None:
            save_file({"tokens": tokens.int().contiguous()}, contexts)
        place = sae_folder(sae, Path(folder) / "sae")
        job = Job(evaluation, str(place), sae.slug, str(out), model=model, tokens=contexts, steps=steps, seed=seed)
        # SAEBench's messages and progress bars go to stderr.
        status = subprocess.run([python, "-I", saebench_script.__file__, json.dumps(asdict(job))]).returncode
        if status == 130:
            raise KeyboardInterrupt
        if status or not out.exists():
            error = Path(f"{out}.error")
            reason = error.read_text(encoding="utf-8") if error.exists() else f"exit status {status}"
            raise InputError(f"SAEBench's {evaluation} of {sae.source} failed: {reason}")
        return out.read_bytes()


def sae_folder(sae: EvaluatedSAE, folder: Path) -> Path:
    """The SAELens folder of an SAE. An SAE from the Hub is written to `folder`."""
    place = exported_sae(Path(sae.source)) if sae.run else Path(sae.source)
    if not place.is_dir():
        sae.sae.save_model(folder)
        return folder
    return place.resolve()


def figures(result: bytes) -> dict[str, float]:
    """The figures of all groups in SAEBench's JSON, by name, without those that SAEBench did not compute."""
    groups = json.loads(result)["eval_result_metrics"].values()
    return {name: value for group in groups for name, value in group.items() if value is not None}

"""`init_from` with SAEs in the formats of other labs, loaded by SAELens from a test hub: same function, and no pickle is executed."""

import json
import subprocess
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.hub import Hub
from tests.helpers.python_server import PythonServer

GEMMA = "gemma-scope-2b-pt-res-canonical:layer_20/width_16k/canonical"
TOPK = "sae_bench_gemma-2-2b_topk_width-2pow12_date-1109:blocks.12.hook_resid_post__trainer_0"
# Runs in a process of its own, because the hub's client reads its endpoint when it is imported.
SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import BatchTopKTrainingSAEConfig, JumpReLUTrainingSAEConfig, TopKTrainingSAEConfig
from metasae_lightning import JointSAE
from metasae_lightning.errors import InputError
from metasae_lightning.sae.init_from import InitFrom
source, x, results = sys.argv[1], load_file(sys.argv[2])["x"], {}
config_classes = {"jumprelu": JumpReLUTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig, "topk": TopKTrainingSAEConfig}
try:
    for target in sys.argv[4:]:
        sizes = {"d_in": x.shape[1], "d_sae": 16384 if "16k" in source else 64, "decoder_init_norm": 1.0}
        cfg = config_classes[target](**sizes, apply_b_dec_to_input="16k" not in source, **({"k": 4} if target == "topk" else {}))
        module = JointSAE(cfg, decoder_rows="free", init_from=InitFrom(source, measured_k=target == "batchtopk"))
        report = module.primary.initialize(x)
        codes, rebuilt = module.primary.read(x)
        print(target, report)
        results |= {f"{target} rebuilt": rebuilt, f"{target} figures": torch.tensor([*report.l0, *report.fvu])}
    save_file(results, sys.argv[3])
except InputError as error:
    sys.exit(f"metasae: error: {error}")
"""


@contextmanager
def initializer(hub: Hub, folder: Path) -> Generator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A function that initialises training SAEs from an SAE of the hub in a new process; results are in `found.safetensors`."""
    with PythonServer(hub.environment(folder / "home")) as server:

        def initialize(source: str, x: torch.Tensor, *targets: str) -> subprocess.CompletedProcess[str]:
            save_file({"x": x}, folder / "x.safetensors")
            return server.run(SCRIPT, source, folder / "x.safetensors", folder / "found.safetensors", *targets, cwd=folder)

        yield initialize


# DeepMind's parameters: codes are pre-activations above a threshold per latent, `b_dec` is not subtracted, decoder rows have unit norm.
def test_init_from_gemma_scope_computes_its_function(tmp_path: Path):
    generator, d_in, d_sae = torch.Generator().manual_seed(0), 2304, 16384
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1).half()
    weights = {
        "W_enc": rows.T,
        "W_dec": rows,
        "b_enc": torch.randn(d_sae, generator=generator).half() / 10,
        "b_dec": torch.randn(d_in, generator=generator),
    }
    weights["threshold"] = 2.5 + torch.rand(d_sae, generator=generator)
    folder = tmp_path / "hub" / "models" / "google" / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    numpy.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    x = torch.randn(64, d_in, generator=generator) + weights["b_dec"]
    with Hub(tmp_path / "hub") as hub, initializer(hub, tmp_path) as initialize:
        process = initialize(GEMMA, x, "jumprelu", "batchtopk")
    assert process.returncode == 0, process.stderr
    results = load_file(tmp_path / "found.safetensors")
    hidden = x @ weights["W_enc"].float() + weights["b_enc"].float()
    codes = hidden * (hidden > weights["threshold"])
    rebuilt = codes @ weights["W_dec"].float() + weights["b_dec"]
    l0 = (codes > 0).sum(1).float().mean().item()
    fvu = ((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()).item()
    torch.testing.assert_close(results["jumprelu rebuilt"], rebuilt, rtol=1e-4, atol=1e-3)
    before, after = results["jumprelu figures"][:2].tolist()
    assert before == after == pytest.approx(l0, rel=1e-3) and 20 < l0 < 400
    assert results["jumprelu figures"][2:].tolist() == pytest.approx([fvu, fvu], rel=1e-4)
    assert "jumprelu from" in process.stdout and "ranks a batch's activations" in process.stdout
    assert results["batchtopk figures"][1].item() == pytest.approx(l0, rel=1e-2)


class MaliciousPickle:
    """A pickle that creates a file when it is loaded, in place of harmful code."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


# SAEBench's SAEs are pickles: one of tensors is loaded, and one that would execute code is refused.
def test_init_from_saebench_loads_tensors_and_refuses_a_pickle_with_code(tmp_path: Path):
    generator, d_in, d_sae = torch.Generator().manual_seed(0), 16, 64
    repository = tmp_path / "hub" / "models" / "canrager" / "saebench_gemma-2-2b_width-2pow12_date-1109"
    folder = repository / "gemma-2-2b_topk_width-2pow12_date-1109" / "resid_post_layer_12" / "trainer_0"
    folder.mkdir(parents=True)
    trainer = {
        "layer": 12,
        "dict_class": "AutoEncoderTopK",
        "k": 4,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "lm_name": "google/gemma-2-2b",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    weights = {
        "encoder.weight": rows,
        "encoder.bias": torch.zeros(d_sae),
        "decoder.weight": rows.T,
        "b_dec": torch.randn(d_in, generator=generator),
    }
    torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "ae.pt")
    x = torch.randn(64, d_in, generator=generator)
    with Hub(tmp_path / "hub") as hub, initializer(hub, tmp_path) as initialize:
        process = initialize(TOPK, x, "topk")
        assert process.returncode == 0, process.stderr
        hidden = (x - weights["b_dec"]) @ rows.T
        codes = torch.zeros_like(hidden).scatter(1, hidden.topk(4).indices, hidden.topk(4).values.relu())
        torch.testing.assert_close(load_file(tmp_path / "found.safetensors")["topk rebuilt"], codes @ rows + weights["b_dec"])
        torch.save({**weights, "threshold": MaliciousPickle()}, folder / "ae.pt")
        refused = initialize(TOPK, x, "topk")
    assert refused.returncode == 1 and refused.stderr.strip().split("\n")[-1].startswith("metasae: error: ")
    assert not list(tmp_path.rglob("executed"))

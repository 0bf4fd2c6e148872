"""SAEs as labs publish them, through SAELens's own loaders and a hub on 127.0.0.1: what they compute, and that nothing bites."""

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
# In a process of its own, because the hub's client takes its endpoint when it is imported.
LOOK = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import BatchTopKTrainingSAEConfig, JumpReLUTrainingSAEConfig, TopKTrainingSAEConfig
from metasae_lightning import JointSAE
from metasae_lightning.errors import InputError
from metasae_lightning.sae.init_from import InitFrom
place, x, found = sys.argv[1], load_file(sys.argv[2])["x"], {}
make = {"jumprelu": JumpReLUTrainingSAEConfig, "batchtopk": BatchTopKTrainingSAEConfig, "topk": TopKTrainingSAEConfig}
try:
    for target in sys.argv[4:]:
        sizes = {"d_in": x.shape[1], "d_sae": 16384 if "16k" in place else 64, "decoder_init_norm": 1.0}
        cfg = make[target](**sizes, apply_b_dec_to_input="16k" not in place, **({"k": 4} if target == "topk" else {}))
        module = JointSAE(cfg, decoder_rows="free", init_from=InitFrom(place, measured_k=target == "batchtopk"))
        adopted = module.primary.initialize(x)
        codes, rebuilt = module.primary.read(x)
        print(target, adopted)
        found |= {f"{target} rebuilt": rebuilt, f"{target} figures": torch.tensor([*adopted.l0, *adopted.fvu])}
    save_file(found, sys.argv[3])
except InputError as error:
    sys.exit(f"metasae: error: {error}")
"""


@contextmanager
def loader(hub: Hub, folder: Path) -> Generator[Callable[..., subprocess.CompletedProcess[str]]]:
    """A function that loads an SAE from the hub in a new process and rebuilds activations with it, into `found.safetensors`."""
    with PythonServer(hub.environment(folder / "home")) as server:

        def load(place: str, x: torch.Tensor, *targets: str) -> subprocess.CompletedProcess[str]:
            save_file({"x": x}, folder / "x.safetensors")
            return server.run(LOOK, place, folder / "x.safetensors", folder / "found.safetensors", *targets, cwd=folder)

        yield load


# DeepMind's own parameters: codes are pre-activations above a threshold each, the decoder's bias is not subtracted, rows are unit.
def test_gemma_scope_trains_on(tmp_path: Path):
    g, d_in, d_sae = torch.Generator().manual_seed(0), 2304, 16384
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=-1).half()
    weights = {
        "W_enc": rows.T,
        "W_dec": rows,
        "b_enc": torch.randn(d_sae, generator=g).half() / 10,
        "b_dec": torch.randn(d_in, generator=g),
    }
    weights["threshold"] = 2.5 + torch.rand(d_sae, generator=g)
    place = tmp_path / "hub" / "models" / "google" / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    place.mkdir(parents=True)
    numpy.savez(place / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    x = torch.randn(64, d_in, generator=g) + weights["b_dec"]
    with Hub(tmp_path / "hub") as hub, loader(hub, tmp_path) as load:
        done = load(GEMMA, x, "jumprelu", "batchtopk")
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    hidden = x @ weights["W_enc"].float() + weights["b_enc"].float()
    codes = hidden * (hidden > weights["threshold"])
    rebuilt = codes @ weights["W_dec"].float() + weights["b_dec"]
    l0 = (codes > 0).sum(1).float().mean().item()
    fvu = ((x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()).item()
    torch.testing.assert_close(found["jumprelu rebuilt"], rebuilt, rtol=1e-4, atol=1e-3)
    before, after = found["jumprelu figures"][:2].tolist()
    assert before == after == pytest.approx(l0, rel=1e-3) and 20 < l0 < 400
    assert found["jumprelu figures"][2:].tolist() == pytest.approx([fvu, fvu], rel=1e-4)
    assert "jumprelu from" in done.stdout and "ranks a batch's activations" in done.stdout
    assert found["batchtopk figures"][1].item() == pytest.approx(l0, rel=1e-2)


class Bite:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("bitten"),))


# SAEBench's zoo is pickled: tensors are read, and a pickle that would run something is not.
def test_a_zoo_of_pickles_is_read_and_does_not_bite(tmp_path: Path):
    g, d_in, d_sae = torch.Generator().manual_seed(0), 16, 64
    repository = tmp_path / "hub" / "models" / "canrager" / "saebench_gemma-2-2b_width-2pow12_date-1109"
    place = repository / "gemma-2-2b_topk_width-2pow12_date-1109" / "resid_post_layer_12" / "trainer_0"
    place.mkdir(parents=True)
    trainer = {
        "layer": 12,
        "dict_class": "AutoEncoderTopK",
        "k": 4,
        "activation_dim": d_in,
        "dict_size": d_sae,
        "lm_name": "google/gemma-2-2b",
    }
    (place / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=-1)
    weights = {
        "encoder.weight": rows,
        "encoder.bias": torch.zeros(d_sae),
        "decoder.weight": rows.T,
        "b_dec": torch.randn(d_in, generator=g),
    }
    torch.save({name: tensor.contiguous() for name, tensor in weights.items()}, place / "ae.pt")
    x = torch.randn(64, d_in, generator=g)
    with Hub(tmp_path / "hub") as hub, loader(hub, tmp_path) as load:
        done = load(TOPK, x, "topk")
        assert done.returncode == 0, done.stderr
        hidden = (x - weights["b_dec"]) @ rows.T
        codes = torch.zeros_like(hidden).scatter(1, hidden.topk(4).indices, hidden.topk(4).values.relu())
        torch.testing.assert_close(load_file(tmp_path / "found.safetensors")["topk rebuilt"], codes @ rows + weights["b_dec"])
        torch.save({**weights, "threshold": Bite()}, place / "ae.pt")
        bitten = load(TOPK, x, "topk")
    assert bitten.returncode == 1 and bitten.stderr.strip().split("\n")[-1].startswith("metasae: error: ")
    assert not list(tmp_path.rglob("bitten"))

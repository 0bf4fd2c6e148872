"""Architectures that are exported as SAELens's own classes have the same codes in a process without this package."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from safetensors.torch import load_file, save_file

from metasae_lightning.architectures import AdaptiveElasticNetTrainingSAEConfig, PaperGatedTrainingSAEConfig
from metasae_lightning.sae.export import export
from metasae_lightning.sae.normalizers import make_normalizer

D_IN, D_SAE = 6, 10
BOTH = {"W_enc", "W_dec", "b_dec"}
# The config, and the class that it is exported as, with the names of that class's weights.
EXPORTED_AS: list[tuple[Any, str, set[str]]] = [
    (PaperGatedTrainingSAEConfig, "gated", BOTH | {"b_gate", "b_mag", "r_mag"}),
    (PaperGatedTrainingSAEConfig, "jumprelu", BOTH | {"b_enc", "threshold"}),
    (AdaptiveElasticNetTrainingSAEConfig, "standard", BOTH | {"b_enc"}),
]
NORMALIZERS = ("none", "layer_norm", "expected_average_only_in")
READ_WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["metasae_lightning"] = None  # an import of it fails
from sae_lens import SAE
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(load_file(folder + "/x")["x"]).detach()
    save_file({"acts": acts, "out": sae.decode(acts).detach()}, f"{folder}/{sae.cfg.architecture()}")
"""


def test_exported_codes_are_those_of_training_in_a_process_without_this_package(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, D_IN, generator=generator) + 0.5
    expected: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for config_class, architecture, names in EXPORTED_AS:
        cfg = config_class(d_in=D_IN, d_sae=D_SAE)
        sae: Any = get_sae_training_class(cfg.architecture())[0](cfg)
        for parameter in sae.parameters():  # no default values
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
        for name in NORMALIZERS:
            normalizer = make_normalizer(name, D_IN)
            normalizer.fit(x)
            folder = tmp_path / f"{architecture}-{name}"
            record = export(sae, folder, normalizer=normalizer, updates=0, samples=[x], as_jumprelu=architecture == "jumprelu")
            assert load_file(folder / "sae_weights.safetensors").keys() == names
            save_file({"x": x}, folder / "x")
            z, undo = normalizer.normalize(x)
            with torch.no_grad():
                acts = sae.encode(z)
                expected[f"{folder}/{architecture}"] = acts, normalizer.restore(sae.decode(acts), undo)
            assert record.l0 == pytest.approx((acts != 0).sum().item() / 500) and 1 < record.l0 < 9
    folders = [path.rpartition("/")[0] for path in expected]
    subprocess.run([sys.executable, "-c", READ_WITHOUT_THIS_PACKAGE, *folders], check=True)
    for path, (acts, reconstruction) in expected.items():
        read = load_file(path)
        torch.testing.assert_close(read["acts"], acts, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(read["out"], reconstruction, rtol=1e-5, atol=1e-5)

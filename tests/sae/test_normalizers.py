"""An exported SAE that others load from the Hub gives the codes and reconstructions of the run, for every architecture and normaliser."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from metasae_lightning.sae.normalizers import ExpectedAverage
from tests.helpers.architectures import ARCHITECTURES, activations
from tests.helpers.hub import Hub
from tests.helpers.python_server import PythonServer
from tests.sae.test_pretrained import NORMALIZERS, TENSORS, export_primary, train_module

pytestmark = pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")
TOKEN = "hf_testtoken"
CASES = [(name, norm) for name in ARCHITECTURES for norm in NORMALIZERS if (name, norm) != ("matching_pursuit", "covariance_whitening")]
LOAD = """
import sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
x, results = load_file(sys.argv[1])["x"], {}
for name in sys.argv[3:]:
    sae = SAE.from_pretrained("someone/saes", name)
    codes = sae.encode(x)
    results |= {f"{name} codes": codes.detach(), f"{name} rebuilt": sae.decode(codes).detach()}
save_file(results, sys.argv[2])
"""


def training_result(module: Any, x: Tensor) -> dict[str, Tensor]:
    """Codes and reconstruction by the training SAE in normalised space, with its threshold in place of the ranking of a batch."""
    sae, norm = module.primary.sae, module.primary.normalizer
    z, undo = norm.normalize(x)
    codes = sae.encode(z)
    if "batchtopk" in sae.cfg.architecture():
        threshold = sae.topk_threshold / (1 - (1 - sae.cfg.topk_threshold_lr) ** int(module.primary.updates))
        _, hidden = sae.encode_with_hidden_pre(z)
        codes = hidden.relu() * (hidden > threshold)
    rebuilt = norm.restore(sae.decode(codes), undo)
    directions = getattr(sae.cfg, "rescale_acts_by_decoder_norm", sae.cfg.architecture() == "matching_pursuit")
    if isinstance(norm, ExpectedAverage) and directions:  # unit decoder rows: the codes are in units of raw activations
        codes = codes / norm.factor.float()
    return {"codes": codes.detach(), "rebuilt": rebuilt.detach()}


# One process trains, exports and publishes every case into one repository; another process loads them all.
def test_an_sae_loaded_from_the_hub_encodes_as_in_the_run(tmp_path: Path):
    x, expected, folders = activations(77, rows=256) + 2.0, dict[str, dict[str, Tensor]](), dict[str, Path]()
    for name, normalizer in CASES:
        module, case = train_module(name, steps=20, normalize_activations=normalizer, offset=2.0), f"{name}/{normalizer}"
        folders[case] = tmp_path / "saes" / case
        export_primary(module, folders[case])
        expected[case] = training_result(module, x)
    send = "import sys; from pathlib import Path; from metasae_lightning.sae.publish import publish; root = Path(sys.argv[1]); "
    send += "publish({name: root / name for name in sys.argv[2:]}, 'hf://someone/saes')"
    save_file({"x": x}, tmp_path / "x.safetensors")
    calls = [[send, str(tmp_path / "saes"), *folders], [LOAD, str(tmp_path / "x.safetensors"), str(tmp_path / "found"), *folders]]
    with Hub(tmp_path / "hub", token=TOKEN) as hub, PythonServer(hub.environment(tmp_path / "home", HF_TOKEN=TOKEN)) as server:
        for code, *args in calls:
            process = server.run(code, *args, cwd=tmp_path)
            assert process.returncode == 0, process.stderr
    loaded = load_file(tmp_path / "found")
    for case, (name, _) in zip(expected, CASES, strict=True):
        assert set(load_file(tmp_path / "hub" / "models" / "someone" / "saes" / case / "sae_weights.safetensors")) == TENSORS[name]
        codes, rebuilt = loaded[f"{case} codes"], loaded[f"{case} rebuilt"]
        has_same_support = ((codes != 0) == (expected[case]["codes"] != 0)).all(-1)
        assert has_same_support.float().mean() > 0.97, case  # in fp32 a pre-activation very near the threshold may fall on either side
        for result, expected_result in ((codes, expected[case]["codes"]), (rebuilt, expected[case]["rebuilt"])):
            assert (result - expected_result)[has_same_support].abs().max() <= 1e-5 * expected_result.abs().max(), case

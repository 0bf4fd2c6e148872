"""An evaluation that counts each sign of a latent: firings, contexts, cache and page; SAEs without signs are refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from metasae_lightning.architectures import Units
from metasae_lightning.architectures.signed_gated import SignedGatedSAE, SignedGatedSAEConfig
from metasae_lightning.cli import main
from metasae_lightning.data.recipe import data_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import open_latents
from metasae_lightning.evaluation.evaluate import evaluate
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.report.latent_browser import browsed_latents, matches_of_arms, read_decoder
from metasae_lightning.report.load_runs import load_arms
from tests.helpers.judged import D_IN, HOOK, data_config, sae, write_run

D_SAE = 20
QUICK: dict[str, Any] = {"critic_seeds": 0, "splice_tokens": 0, "resamples": 10}
WORDS = [f"--{name}={value}" for name, value in QUICK.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose primary has signed codes: random directions, both gates with a threshold of 0.5."""
    folder = tmp_path_factory.mktemp("signed")
    signed, tied = SignedGatedSAE(SignedGatedSAEConfig(d_in=D_IN, d_sae=D_SAE)), sae(0, D_SAE)
    weights = {name: tied.state_dict()[name] for name in ("W_enc", "W_dec", "b_dec")}
    gates = {f"b_gate{sign}": torch.full((D_SAE,), -0.5) for sign in ("", "_negative")}
    signed.load_state_dict({**signed.state_dict(), **weights, **gates})
    for name, value in {"model_name": str(folder / "model"), "hook_name": HOOK, "training_tokens": 2048}.items():
        signed.cfg.metadata[name] = value
    path = folder / "run"
    signed.save_model(path / "saes" / "primary")
    (path / "config.yaml").write_text(yaml.safe_dump({"data": data_config(folder)}))
    return path


def record(run: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((run / "latents.json.gz").read_bytes()))


def test_each_sign_is_a_latent_of_the_evaluation(run: Path):
    subject, data = load_sae(str(run)), data_of(run / "config.yaml")
    (both,) = evaluate([subject], data, Settings(**QUICK))
    (signs,) = evaluate([load_sae(str(run))], data_of(run / "config.yaml"), Settings(**QUICK, by_polarity=True))
    assert signs.entry["by_polarity"] and "by_polarity" not in both.entry
    assert len(signs.collected.subject.W_dec) == 2 * D_SAE == 2 * len(both.collected.subject.W_dec)
    for (codes, entry), (by_sign, _) in zip(both.collected.codes(), signs.collected.codes(), strict=True):
        dense, divided = torch.zeros(codes.shape), torch.zeros(by_sign.shape)
        dense[codes.rows, codes.latents] = codes.values
        divided[by_sign.rows, by_sign.latents] = by_sign.values
        positive, negative = divided.split(D_SAE, dim=1)
        assert (positive > 0).any() and (negative > 0).any() and not ((positive > 0) & (negative > 0)).any()
        torch.testing.assert_close(positive + negative, dense)
        assert entry["counted"].any()
    # Reconstruction and L0 are those of the same codes.
    for name in ("fvu", "l0"):
        assert signs.entry["figures"]["reconstruction"][name] == pytest.approx(both.entry["figures"]["reconstruction"][name], rel=1e-6)
    assert both.entry["figures"]["reconstruction"]["l0"] > 1


def test_the_record_of_latents_and_the_page_have_the_signs(run: Path):
    assert main(["test", str(run), *WORDS]) == 0
    both = record(run)
    with pytest.raises(InputError, match=r"tested with both signs of a latent together: open_latents\(\.\.\., by_polarity=False\)"):
        open_latents(run, by_polarity=True).contexts(0)
    assert main(["test", str(run), *WORDS, "--by_polarity", "true"]) == 0
    signs = record(run)
    assert signs["by_polarity"] and "by_polarity" not in both
    firings = np.asarray(signs["firings"]).reshape(2, D_SAE)
    assert firings.min(1).max() > 0 and firings.sum(0).tolist() == both["firings"]
    assert np.asarray(signs["maximum"]).reshape(2, D_SAE).max(0).tolist() == both["maximum"]
    # Contexts have magnitudes, and tokens promoted by a negative sign are those that minus the row promotes.
    assert all(max(context["values"]) > 0 for contexts in signs["contexts"].values() for context in contexts)
    latent = int(firings[1].argmax())
    assert signs["promoted"][str(D_SAE + latent)] == both["suppressed"][str(latent)] != both["promoted"][str(latent)]
    strongest = open_latents(run, by_polarity=True).contexts(D_SAE + latent)[0]
    assert strongest.activations[strongest.at] == pytest.approx(signs["maximum"][D_SAE + latent], rel=1e-2)
    with pytest.raises(InputError, match=r"tested with each sign of a latent: open_latents\(\.\.\., by_polarity=True\)"):
        open_latents(run).contexts(0)
    (arm,) = load_arms([str(run)])
    decoder = read_decoder(arm)
    assert decoder is not None and np.array_equal(decoder.rows[D_SAE:], -decoder.rows[:D_SAE])
    (browsed,) = browsed_latents([arm], [decoder], matches_of_arms([decoder]), limit=2 * D_SAE)
    assert [latent.number for latent in browsed.latents] == np.flatnonzero(signs["firings"]).tolist()
    assert browsed.entry["latents"] == 2 * D_SAE and arm.judged is None


def test_an_sae_without_signs_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    unsigned = write_run(tmp_path, "unsigned")
    assert main(["test", str(unsigned), *WORDS, "--by_polarity", "true"]) != 0
    lines = capsys.readouterr().err.strip().splitlines()
    assert f"by_polarity: a 'jumprelu' SAE has no latents with activations of both signs: {unsigned}" in lines[-1]
    assert not Units.of(load_sae(str(unsigned)).sae.cfg).is_signed

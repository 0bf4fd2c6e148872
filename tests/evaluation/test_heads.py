"""Heads beside exported SAEs: their folder, what they add on raw activations, and figures with and without them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from metasae_lightning import functional
from metasae_lightning.cli import main
from metasae_lightning.data.recipe import data_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.held_out_text import passages
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.heads import InteractionHead
from metasae_lightning.sae.export import export
from metasae_lightning.sae.exported_head import save_head
from metasae_lightning.sae.pretrained import load_pretrained
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import activations, config, optimizers
from tests.helpers.judged import D_IN, data_config

NORMALIZERS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"]


def trained(architecture: str, normalizer: str, *, rescale: bool) -> JointSAE:
    cfg = config(architecture, normalize_activations=normalizer, rescale_acts_by_decoder_norm=rescale)
    joint = JointSAE(cfg, head=InteractionHead(4, 8), decoder_rows="free")
    optimizer = optimizers(joint, lr=1e-2)[0]
    for i in range(6):
        joint.step(Batch(activations(i)), optimizer)
    with torch.no_grad():
        joint.primary.W_dec.mul_(torch.linspace(0.5, 2, 48)[:, None])
    return joint


def write(joint: JointSAE, folder: Path) -> None:
    """Export the SAE and its head to a folder, as the callback does."""
    learner = joint.primary
    export(learner.sae, folder / "saes" / "primary", normalizer=learner.normalizer, updates=learner.updates)
    save_head(learner, load_pretrained(folder / "saes" / "primary"), folder / "saes" / "head")


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_an_exported_sae_with_its_head_reconstructs_as_in_training(normalizer: str, rescale: bool, tmp_path: Path):
    joint, x = trained("topk", normalizer, rescale=rescale), activations(99)
    (result,) = joint.primary.compute_gradients(x, count=len(x), backward=lambda loss: None).results
    assert result.rebuild_with_head is not None
    write(joint, tmp_path)
    subject = load_sae(str(tmp_path))
    torch.testing.assert_close(subject.reconstruct(x), result.reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(subject.reconstruct_with_head(x), result.rebuild_with_head(), rtol=1e-4, atol=1e-4)
    assert (subject.reconstruct_with_head(x) - subject.reconstruct(x)).abs().max() > 1e-2
    # An SAE that multiplies activations by the norms of decoder rows has others where a factor is folded into the rows: f' = f / factor.
    assert subject.head is not None
    factor = joint.primary.normalizer.factor.item() if rescale and normalizer == "expected_average_only_in" else 1.0  # type: ignore[union-attr]
    torch.testing.assert_close(subject.head.code_scale, torch.full((48,), factor))
    assert (factor == 1.0) != (rescale and normalizer == "expected_average_only_in")


def test_the_saelens_folder_has_nothing_of_the_head(tmp_path: Path):
    joint = trained("topk", "none", rescale=False)
    write(joint, tmp_path)
    primary = tmp_path / "saes" / "primary"
    assert load_file(primary / "sae_weights.safetensors").keys() == {"W_enc", "b_enc", "W_dec", "b_dec"}
    assert sorted(path.name for path in (tmp_path / "saes" / "head").iterdir()) == ["head.json", "head.safetensors"]
    shutil.copytree(primary, tmp_path / "moved")
    assert load_sae(str(tmp_path / "moved")).head is None and load_sae(str(tmp_path)).head is not None
    torch.testing.assert_close(load_pretrained(primary).W_dec, joint.primary.W_dec)  # SAELens reads the folder as ever


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_sae": 47}, "the head is of 47 latents and width 16, the SAE of 48 and 16"),
        ({"class_path": "metasae_lightning.heads.Gone"}, "cannot be read as a head"),
        ({"init_args": {"rank": 5, "hidden": 8}}, "cannot be read as a head"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path):
    write(trained("topk", "none", rescale=False), tmp_path)
    path = tmp_path / "saes" / "head" / "head.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_sae(str(tmp_path))


def fit(folder: Path, **model_args: Any) -> Path:
    """A run of the command on a tiny language model; returns its folder."""
    primary = {"class_path": "sae_lens.BatchTopKTrainingSAEConfig", "init_args": {"d_in": D_IN, "d_sae": 48, "k": 6}}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-2}}
    head = {"class_path": "InteractionHead", "init_args": {"rank": 4, "hidden": 8}}
    model = {"primary": primary, "primary_optimizer": optimizer, "head": head, **model_args}
    tree = {
        "model": {"class_path": "metasae_lightning.JointSAE", "init_args": model},
        "data": data_config(folder, tokens=4096),
        "trainer": {"accelerator": "cpu", "callbacks": [{"class_path": name} for name in ("HeldOut", "Export", "Summary")]},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert main(["fit", "-c", str(folder / "recipe.yaml"), "--run", str(folder / "run")]) == 0
    return folder / "run"


def measured(run: Path) -> dict[str, Any]:
    """The entry that `metasae test` writes."""
    assert main(["test", str(run), "--critic_seeds", "0", "--splice_tokens", "200", "--resamples", "50"]) == 0
    return json.loads((run / "evaluation.json").read_text())["evaluation"]


def zero_last_layer(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) if name == "head.map.2.weight" else value for name, value in weights.items()}


def test_a_run_with_a_head_is_measured_with_and_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = fit(tmp_path)
    assert json.loads((run / "saes" / "primary" / "cfg.json").read_text())["metadata"]["trained_with_head"] is True
    entry = measured(run)
    table = capsys.readouterr().out
    assert "unexplained with the head on codes" in table and "loss with the SAE and its head in it" in table
    figures, head = entry["figures"], entry["figures"]["head"]
    data = data_of(run / "config.yaml")
    data.setup("test")
    x = torch.cat([passage.read()[0] for passage in passages(data.stream("test", 700), 700)])
    subject = load_sae(str(run))
    alone, together = (functional.fvu(x, rebuild(x)).item() for rebuild in (subject.reconstruct, subject.reconstruct_with_head))
    assert figures["reconstruction"]["fvu"] == pytest.approx(alone, rel=1e-4)
    assert head["fvu"] == pytest.approx(together, rel=1e-4) and abs(alone - together) > 1e-4
    assert head["fvu_change"] == pytest.approx(together - alone, abs=1e-5)
    assert head["ce_sae_change"] == pytest.approx(head["ce_sae"] - figures["splice"]["ce_sae"]) and head["ce_sae_change"] != 0
    for name in ("fvu", "fvu_change", "ce_sae", "ce_sae_change", "kl_change"):
        low, high = entry["intervals"][f"head_{name}"]
        assert low < high and low - (high - low) < head[name] < high + (high - low), name

    # Control: a head whose last layer is zero adds nothing, to the last bit.
    path = run / "saes" / "head" / "head.safetensors"
    save_file(zero_last_layer(load_file(path)), path)
    silent = measured(run)["figures"]
    assert silent["head"]["fvu_change"] == 0 == silent["head"]["ce_sae_change"]
    assert silent["head"]["kl"] == silent["splice"]["kl"] and silent["splice"] == figures["splice"]

    # Without its folder, the SAE's own figures are the same.
    shutil.rmtree(run / "saes" / "head")
    without = measured(run)["figures"]
    assert "head" not in without and {**silent, "head": None} == {**without, "head": None}


def test_a_detached_head_is_not_named_in_the_metadata_of_the_sae(tmp_path: Path):
    run = fit(tmp_path, head_training="detached")
    assert "trained_with_head" not in json.loads((run / "saes" / "primary" / "cfg.json").read_text())["metadata"]
    assert json.loads((run / "saes" / "head" / "head.json").read_text())["head_training"] == "detached"

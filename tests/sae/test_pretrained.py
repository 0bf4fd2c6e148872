"""Exported folders work on raw activations in SAELens's own code."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from safetensors.torch import load_file

from metasae_lightning import functional
from metasae_lightning.callbacks import Export
from metasae_lightning.errors import InputError
from metasae_lightning.sae import export, forward, pretrained
from metasae_lightning.sae.normalizers import make_normalizer
from metasae_lightning.sae.thresholds import global_threshold
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import ARCHITECTURES, D_IN, activations, config, optimizers

NORMALIZERS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"]
TENSORS = {
    "standard": {"W_enc", "W_dec", "b_enc", "b_dec"},
    "gated": {"W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"},
    "jumprelu": {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"},
    "topk": {"W_enc", "W_dec", "b_enc", "b_dec"},
    "batchtopk": {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"},
    "matryoshka_batchtopk": {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"},
    "abstopk": {"W_enc", "W_dec", "b_enc", "b_dec"},
    "matching_pursuit": {"W_dec", "b_dec"},
}
pytestmark = pytest.mark.filterwarnings("ignore:decoder_init_norm must be set")


def train_module(name: str, *, steps: int = 30, offset: float = 0.0, **kw: Any) -> JointSAE:
    module = JointSAE(config(name, **kw), decoder_rows="free", dead_after_tokens=128)
    optimizer, _ = optimizers(module, lr=3e-3)
    for i in range(steps):
        module.step(Batch(activations(i) + offset), optimizer)
    return module


def export_primary(module: JointSAE, folder: Path, **kw: Any) -> export.ExportRecord:
    learner = module.primary
    return export.export(learner.sae, folder, normalizer=learner.normalizer, updates=int(learner.updates), **kw)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_exported_sae_encodes_raw_activations_as_in_training(name: str, normalizer: str, tmp_path: Path):
    if (name, normalizer) == ("matching_pursuit", "covariance_whitening"):
        with pytest.raises(ValueError, match="not supported for MatchingPursuit"):  # a tied encoder cannot absorb the whitening
            train_module(name, normalize_activations=normalizer)
        return
    module = train_module(name, normalize_activations=normalizer, offset=2.0)
    folder = tmp_path / "saes" / "primary"
    export_primary(module, folder)
    assert set(load_file(folder / "sae_weights.safetensors")) == TENSORS[name]
    loaded, x = SAE.load_from_disk(folder), activations(77, rows=256) + 2.0
    sae, norm = module.primary.sae, module.primary.normalizer
    z, undo = norm.normalize(x)
    codes = sae.encode(z)
    if "batchtopk" in name:  # inference uses the threshold for each token instead of ranking a batch
        threshold = sae.topk_threshold / (1 - (1 - sae.cfg.topk_threshold_lr) ** int(module.primary.updates))
        _, hidden = sae.encode_with_hidden_pre(z)
        codes = hidden.relu() * (hidden > threshold)
    rebuilt = norm.restore(sae.decode(codes), undo)
    training_reconstruction, loaded_reconstruction = rebuilt.detach(), loaded.decode(loaded.encode(x)).detach()
    has_same_support = ((codes != 0) == (loaded.encode(x) != 0)).all(-1)
    assert has_same_support.float().mean() > 0.97  # in fp32 a pre-activation very near the threshold may fall on either side
    torch.testing.assert_close(loaded_reconstruction[has_same_support], training_reconstruction[has_same_support], rtol=1e-4, atol=1e-4)


# SAELens passes an attention hook's heads as a separate dimension; training and our own readers flatten them.
def test_an_sae_of_flattened_heads_accepts_separate_heads(tmp_path: Path):
    module = train_module("jumprelu")
    export_primary(module, tmp_path / "x", metadata={"hook_name": "blocks.1.attn.hook_z"}, samples=[activations(3)])
    loaded, own_loaded, x = SAE.load_from_disk(tmp_path / "x"), pretrained.load_pretrained(tmp_path / "x"), activations(77)
    heads = x.view(len(x), 4, 4)
    assert loaded(heads).shape == heads.shape
    torch.testing.assert_close(loaded(heads).flatten(1), own_loaded(x))


def test_an_export_without_the_normaliser_has_a_higher_fvu(tmp_path: Path):
    module = train_module("batchtopk", normalize_activations="expected_average_only_in", offset=2.0)
    learner = module.primary
    without_normalizer = export.export(learner.sae, tmp_path / "x", normalizer=make_normalizer("none", D_IN), updates=int(learner.updates))
    x = activations(77) + 2.0
    loaded = SAE.load_from_disk(without_normalizer.folder)
    with_normalizer = SAE.load_from_disk(export_primary(module, tmp_path / "y").folder)
    assert functional.fvu(x, loaded(x)) > 1.2 * functional.fvu(x, with_normalizer(x))


@pytest.mark.parametrize("steps", [5, 50, 300])
def test_exported_l0_is_the_training_l0_after_any_number_of_steps(steps: int, tmp_path: Path):
    module = train_module("batchtopk", steps=steps)
    samples = [activations(10_000 + i, rows=512) for i in range(8)]
    record = export_primary(module, tmp_path / "sae", samples=samples)
    fresh = torch.cat([activations(20_000 + i, rows=512) for i in range(8)])
    l0 = (SAE.load_from_disk(tmp_path / "sae").encode(fresh) > 0).sum(-1).float().mean().item()
    assert record.l0 == pytest.approx(4.0, rel=0.02)
    assert l0 == pytest.approx(4.0, rel=0.03)
    if steps < 300:  # control: the threshold that SAELens would save, a running mean that started at 0
        module.primary.sae.save_inference_model(tmp_path / "raw")
        raw_l0 = (SAE.load_from_disk(tmp_path / "raw").encode(fresh) > 0).sum(-1).float().mean().item()
        assert raw_l0 > 4.0 * 1.05


def test_the_record_has_the_measurements_of_the_saved_folder(tmp_path: Path):
    module = train_module("batchtopk")
    samples = [activations(10_000 + i, rows=512) for i in range(4)]
    record = export_primary(module, tmp_path / "sae", samples=samples, metadata={"model_name": "m", "hook_name": "blocks.1.hook_resid_pre"})
    loaded, x = SAE.load_from_disk(tmp_path / "sae"), torch.cat(samples)
    assert record.fvu == pytest.approx(functional.fvu(x, loaded(x)).item(), rel=1e-5)
    assert record.tokens == 2048 and record.target_l0 == 4.0
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu" and cfg["device"] == "cpu"
    assert cfg["metadata"]["hook_name"] == "blocks.1.hook_resid_pre" and cfg["metadata"]["training_architecture"] == "batchtopk"
    assert cfg["metadata"]["l0"] == record.l0 == loaded.cfg.metadata.l0


# SAELens's trainer writes `l0` and `num_dead_features` at the end of training.
def test_the_export_callback_counts_the_dead_latents_in_the_metadata(tmp_path: Path):
    learner, callback = train_module("batchtopk").primary, Export()
    learner.silent_for[:5] = learner.config.dead_after
    learner.silent_for[5:] = learner.config.dead_after - 1
    callback._write("primary", learner, learner.weights(), tmp_path, {"training_tokens": 7}, [activations(1)])
    metadata = SAE.load_from_disk(tmp_path / "primary").cfg.metadata
    assert (metadata.num_dead_features, metadata.training_tokens) == (5, 7)
    assert metadata.l0 == callback.records["primary"].l0


def test_an_export_does_not_change_the_sae_in_training_and_replaces_an_older_folder(tmp_path: Path):
    module = train_module("batchtopk", normalize_activations="covariance_whitening")
    before, state = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    export_primary(module, tmp_path / "sae", samples=[activations(1)])
    export_primary(module, tmp_path / "sae", samples=[activations(1)])
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_a_failed_export_keeps_the_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = train_module("batchtopk", steps=3)
    export_primary(module, tmp_path / "sae")
    weights_before = (tmp_path / "sae" / "sae_weights.safetensors").read_bytes()

    def raise_no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(module.primary.sae), "save_inference_model", raise_no_space)
    with pytest.raises(InputError, match=r"cannot write the SAE folder .*No space left"):
        export_primary(module, tmp_path / "sae")
    assert (tmp_path / "sae" / "sae_weights.safetensors").read_bytes() == weights_before
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_the_global_threshold_gives_the_target_l0_even_if_one_batch_has_most_of_the_firings():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(100, 200, generator=generator) * scale for scale in (0.01, 0.01, 0.01, 5.0)]
    for target in (1.0, 3.5, 40.0):
        threshold, _ = global_threshold(lambda x: x, batches, target)
        n_active = sum(int((batch > threshold).sum()) for batch in batches)
        assert n_active == round(target * 400)


def test_setting_a_threshold_for_a_diverged_sae_is_refused():
    with pytest.raises(InputError, match="the SAE has diverged"):
        global_threshold(lambda x: x * float("inf"), [torch.ones(4, 8)], 1.0)


def test_saelens_own_layer_norm_raises_with_the_auxiliary_loss():
    """Why normalisers are outside the SAE: SAELens's TopK refuses its auxiliary loss under layer_norm as soon as a latent is dead."""
    module = train_module("batchtopk", normalize_activations="layer_norm", d_sae=400)
    assert module.primary.dead.any()
    with_layer_norm = get_sae_training_class("batchtopk")[0](config("batchtopk", normalize_activations="layer_norm"))
    with pytest.raises(ValueError, match="does not support activation normalization"):
        forward.forward_pass_for(with_layer_norm, "dense").train(
            activations(0), dead=torch.ones(48, dtype=torch.bool), step=0, fresh_gradients=True
        )


def test_an_export_emits_no_warning_of_saelens(tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = train_module("batchtopk", steps=2)
        record = export_primary(module, tmp_path / "sae", samples=[activations(0)])
    assert record.tokens == 64


def test_an_export_is_measured_on_the_cpu_where_the_device_has_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    learner, devices = train_module("batchtopk", steps=5).primary, list[str]()
    load = export.load_pretrained

    def load_if_there_is_room(folder: Path, *, device: torch.device) -> Any:
        devices.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("no memory left")
        return load(folder, device=device)

    monkeypatch.setattr(export, "load_pretrained", load_if_there_is_room)
    samples, device = [activations(100)], torch.device("meta")
    arguments: dict[str, Any] = {"normalizer": learner.normalizer, "updates": learner.updates, "samples": samples}
    record = export.export(learner.sae, tmp_path / "fallback", device=device, **arguments)
    assert devices[:2] == ["meta", "cpu"]
    assert record.l0 == export.export(learner.sae, tmp_path / "cpu", **arguments).l0

"""Dead latents, and the auxiliary loss that makes them fire again."""

import dataclasses
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig
from torch import Tensor

from metasae_lightning import ActivationsDataModule
from metasae_lightning.corpora import PythonDocs
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.step import Batch
from metasae_lightning.training import JointSAE
from tests.helpers.architectures import activations, config, optimizers


def with_half_dead(cfg: Any, warm: Tensor, **kw: Any) -> tuple[JointSAE, Tensor]:
    """A module whose even latents cannot fire on any of these tokens and are counted as dead."""
    module = JointSAE(cfg, dead_after_tokens=1024, **kw)
    module.primary.initialize(warm)
    dead = torch.arange(cfg.d_sae) % 2 == 0
    with torch.no_grad():
        _, highest = module.primary.sae.encode_with_hidden_pre(module.primary.normalizer.normalize(warm)[0])
        module.primary.sae.b_enc[dead] -= highest.amax(0)[dead].clamp(min=0)
    module.primary.silent_for[dead] = 10_000
    return module, dead


@pytest.mark.parametrize("normalizer", ["none", "layer_norm"])
def test_the_auxiliary_loss_gives_gradients_to_the_encoders_of_dead_latents(normalizer: str):
    cfg = config("batchtopk", normalize_activations=normalizer)
    for coefficient, is_reached in ((1.0, True), (0.0, False)):
        module, dead = with_half_dead(
            dataclasses.replace(cfg, aux_loss_coefficient=coefficient), torch.cat([activations(i) for i in range(3)])
        )
        primary, _ = optimizers(module)
        output = module.step(Batch(activations(1)), primary)
        gradient = module.primary.sae.W_enc.grad
        assert gradient is not None and gradient[:, ~dead].abs().sum() > 0
        assert (output.codes.firings()[dead] == 0).all()
        assert ((gradient[:, dead].abs().sum(0) > 0).float().mean() > 0.3) == is_reached


@pytest.mark.slow
def test_the_auxiliary_loss_makes_half_of_the_dead_latents_of_a_real_model_fire():
    steps, size = 500, 256
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.15.hook_resid_post")
    data = ActivationsDataModule(model, PythonDocs(), tokens=32 * 1024, batch_size=size, buffer_size=16_384, skip_positions=2)
    data.setup()
    batches = [batch.activations for batch in data.train_dataloader()]
    still_dead: dict[float, float] = {}
    for coefficient in (1.0, 0.0):
        cfg = BatchTopKTrainingSAEConfig(
            d_in=576, d_sae=2304, k=32, normalize_activations="layer_norm", decoder_init_norm=1.0, aux_loss_coefficient=coefficient
        )
        module, dead = with_half_dead(cfg, torch.cat(batches[:8]))
        primary, _ = optimizers(module)
        fired = torch.zeros_like(dead)
        for i in range(steps):
            fired |= module.step(Batch(batches[i % len(batches)]), primary).codes.firings() > 0
        still_dead[coefficient] = 1 - fired[dead].float().mean().item()
    print(f"still dead after {steps} steps: {still_dead[1.0]:.1%} with the auxiliary loss, {still_dead[0.0]:.1%} without")
    assert still_dead[1.0] <= 0.5
    assert still_dead[0.0] > still_dead[1.0]

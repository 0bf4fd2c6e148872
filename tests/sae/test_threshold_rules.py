"""Each threshold rule gives its L0 on fresh tokens of a real language model, after few training steps and after many."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch import Callback
from sae_lens import SAE, BatchTopKTrainingSAEConfig
from torch.optim import Adam

from metasae_lightning import ActivationsDataModule, JointSAE
from metasae_lightning.corpora import PythonDocs
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.sae import export, pretrained
from metasae_lightning.sae.thresholds import calibrate
from metasae_lightning.step import Batch

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")]
K, STEPS = 32, (50, 300, 1000)


class Snapshots(Callback):
    """Exports after each number of steps in STEPS, into a folder per number."""

    def __init__(self, folder: Path, samples: list[torch.Tensor]):
        self.folder, self.samples = folder, samples

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        steps = int(pl_module.primary.steps)
        if steps in STEPS:
            learner = pl_module.primary
            export_args = {"normalizer": learner.normalizer, "updates": int(learner.updates), "samples": self.samples}
            export.export(learner.sae, self.folder / str(steps), **export_args)


def l0(sae: Any, batches: list[torch.Tensor]) -> float:
    return sum(int((sae.encode(x) > 0).sum()) for x in batches) / sum(map(len, batches))


def test_each_rule_gives_its_l0_on_fresh_tokens_of_a_real_model(tmp_path: Path):
    model = HuggingFaceLM("smollm2-135m-instruct", "blocks.15.hook_resid_post", device="cpu")
    sizes = {"tokens": 256 * STEPS[-1], "batch_size": 256, "buffer_size": 16_384, "validation_tokens": 131_072, "test_tokens": 131_072}
    data = ActivationsDataModule(model, PythonDocs(), held_out=0.05, skip_positions=2, max_norm_ratio=10, **sizes)
    data.setup()
    samples, fresh = ([Batch.of(b).activations for b in loader] for loader in (data.val_dataloader(), data.test_dataloader()))
    primary = BatchTopKTrainingSAEConfig(d_in=576, d_sae=1152, k=K, normalize_activations="layer_norm", decoder_init_norm=1.0)
    module = JointSAE(primary, primary_optimizer=lambda params: Adam(params, lr=2e-3, betas=(0.9, 0.99), fused=True))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    Trainer(max_epochs=1, accelerator="cpu", limit_val_batches=0, callbacks=[Snapshots(tmp_path, samples)], **quiet).fit(
        module, datamodule=data
    )
    for steps in STEPS:
        sae = SAE.load_from_disk(tmp_path / str(steps))
        sample_l0, fresh_l0 = l0(sae, samples), l0(sae, fresh)
        print(f"global, {steps} steps: L0 {sample_l0:.3f} on the sample, {fresh_l0:.2f} on {sum(map(len, fresh)):,} fresh tokens")
        # Other documents may differ more, since one threshold for all latents does not fix how often each latent fires.
        assert sample_l0 == pytest.approx(K, rel=0.01) and fresh_l0 == pytest.approx(K, rel=0.04)
    sae: Any = SAE.load_from_disk(tmp_path / str(STEPS[-1]))
    scores = pretrained.pre_activations(sae)
    assert scores is not None
    l0_by_rule: dict[str, tuple[float, float]] = {}
    for rule in ("rate", "eer"):
        # Each half serves as the other's fresh tokens: differences between documents then cancel, and the rest is due to the rule.
        halves = [(samples, fresh), (fresh, samples)]
        for calibration_batches, other_batches in halves:
            result = calibrate(scores, calibration_batches, K, rule)
            sae.threshold = torch.nn.Parameter(result.threshold)
            l0_by_rule[rule] = (*l0_by_rule.get(rule, ()), l0(sae, other_batches))  # pyright: ignore[reportArgumentType]
            print(f"{rule}: L0 {l0_by_rule[rule][-1]:.2f} on fresh tokens, {result.l0:.2f} on the sample, {result.n_rare} rare latents")
    assert l0_by_rule["rate"] == pytest.approx((K, K), rel=0.04)
    assert sum(l0_by_rule["rate"]) / 2 == pytest.approx(K, rel=0.005)
    assert sum(l0_by_rule["eer"]) / 2 > 1.02 * K

"""Known features: the planted data hand out what fired, and recovery is what SAELens makes of the same tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from sae_lens import BatchTopKTrainingSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.synthetic import (
    ConstantFiringProbabilityConfig,
    SyntheticModel,
    SyntheticModelConfig,
    compute_classification_metrics,
    eval_sae_on_synthetic_data,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from torch import Tensor

from metasae_lightning import JointSAE, SyntheticDataModule
from metasae_lightning.callbacks import HeldOut
from metasae_lightning.errors import InputError
from metasae_lightning.metrics import FeatureRecovery
from metasae_lightning.step import Batch, Codes
from tests.helpers.ranks import on_two_ranks

PLANTED = SyntheticModelConfig(num_features=24, hidden_dim=16, firing_probability=ConstantFiringProbabilityConfig(0.1), seed=1)


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def sparse(tokens: int, width: int, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens, width, generator=generator) * (torch.rand(tokens, width, generator=generator) < share)


def figures(metric: FeatureRecovery) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def of_saelens(codes: Tensor, features: Tensor, W_dec: Tensor, directions: Tensor) -> dict[str, float]:
    found = compute_classification_metrics(codes, features, W_dec, directions)
    directed = {"mcc": mean_correlation_coefficient(W_dec, directions), "uniqueness": feature_uniqueness(W_dec, directions)}
    return {**directed, "precision": found.precision, "recall": found.recall, "f1": found.f1_score}


@pytest.mark.parametrize("seed", range(5))
def test_recovery_is_saelens_classification_on_the_same_tokens(seed: int):
    directions, decoder = rows(12, 8, seed), rows(30, 8, 50 + seed)
    features = sparse(500, 12, 0.2, 100 + seed)
    features[:, 3] = 0  # a feature that never fires
    codes = features[:, torch.arange(30) % 12] * (sparse(500, 30, 0.7, 200 + seed) > 0) - sparse(500, 30, 0.05, 300 + seed)
    codes[:, :4] = 0  # dead latents; others fire below zero, as AbsTopK's do
    metric = FeatureRecovery(directions)
    for part in torch.arange(500).split(170):
        metric.update(decoder, Codes.from_dense(codes[part]), Codes.from_dense(features[part]))
    expected = of_saelens(codes, features, decoder, directions)
    found = figures(metric)
    assert found.pop("absorbed") >= 0  # which SAELens has not
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["f1"] < 0.9 and expected["precision"] != pytest.approx(expected["recall"], abs=0.01)


def test_recovery_is_saelens_evaluation_of_an_sae():
    model = SyntheticModel(PLANTED)
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32))
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([model.feature_dict.feature_vectors, rows(8, 16, 3)]) + 0.15 * rows(32, 16, 2))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.fill_(-0.4)
    torch.manual_seed(7)
    expected = eval_sae_on_synthetic_data(sae, model.feature_dict, model.activation_generator, num_samples=2000, batch_size=500)
    torch.manual_seed(7)
    metric = FeatureRecovery(model.feature_dict.feature_vectors)
    with torch.no_grad():
        for _ in range(4):
            x, features = model.sample_with_features(500)
            metric.update(sae.W_dec, Codes.from_dense(sae.encode(x)), Codes.from_dense(features))
    scores = expected.classification
    wanted = {"mcc": expected.mcc, "uniqueness": expected.uniqueness}
    wanted |= {"precision": scores.precision, "recall": scores.recall, "f1": scores.f1_score}
    found = figures(metric)
    assert found.pop("absorbed") >= 0
    assert found == pytest.approx(wanted, abs=1e-6)
    assert 0.5 < expected.mcc < 1 and 0.3 < scores.f1_score < 1


def test_counts_are_whole_numbers_beyond_what_float32_can_hold():
    metric = FeatureRecovery(torch.eye(2))
    one = Codes.from_dense(torch.tensor([[1.0, 0.0]]))
    metric.update(torch.eye(2), one, one)
    metric.both[0] = metric.fired[0] = metric.true[0] = 2**24  # where float32 counts stand still
    metric.update(torch.eye(2), one, one)
    assert metric.both.dtype == torch.int64 and metric.both[0] == metric.fired[0] == metric.true[0] == 2**24 + 1


def test_a_decoder_without_codes_gives_directions_only_and_a_new_decoder_resets_the_counts():
    decoder, codes = rows(6, 4, 0), Codes.from_dense(sparse(50, 6, 0.5, 1))
    features = Codes.from_dense(sparse(50, 5, 0.5, 2))
    metric = FeatureRecovery(rows(5, 4, 3))
    metric.update(rows(6, 4, 4), Codes.from_dense(sparse(50, 6, 0.5, 5)), features)
    metric.update(decoder)
    assert set(figures(metric)) == {"mcc", "uniqueness"}
    metric.update(decoder, codes, features)
    alone = FeatureRecovery(rows(5, 4, 3))
    alone.update(decoder, codes, features)
    assert figures(metric) == figures(alone)
    metric.reset()
    metric.update(decoder, codes, features)
    assert figures(metric) == figures(alone)


# Feature 1 never comes without feature 0. A latent for both takes its place; with a latent for 1 alone nothing is taken in.
def test_a_feature_in_another_features_latent_counts_as_absorbed():
    truth = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    taken, apart = torch.eye(3), torch.eye(3)
    taken[1] = torch.tensor([0.6, 0.8, 0.0])
    fired = truth.clone()
    fired[0, 0] = 0.0
    for decoder, codes, expected in ((taken, fired, (1 / 3 + 0 + 0) / 3), (taken, truth, 0.0), (apart, fired, 0.0), (-taken, fired, 1 / 9)):
        metric = FeatureRecovery(torch.eye(3))
        metric.update(decoder, Codes.from_dense(codes), Codes.from_dense(truth))
        assert figures(metric)["absorbed"] == pytest.approx(expected)
    # What two features share, a latent of the one holds of the other by right.
    shared = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    metric = FeatureRecovery(shared)
    metric.update(shared, Codes.from_dense(fired), Codes.from_dense(truth))
    assert figures(metric)["absorbed"] == 0.0


def test_codes_and_features_must_have_the_same_tokens():
    metric = FeatureRecovery(torch.eye(3))
    with pytest.raises(InputError, match="of the same tokens, got 4 and 5"):
        metric.update(torch.eye(3), Codes.from_dense(torch.ones(4, 3)), Codes.from_dense(torch.ones(5, 3)))


def counted(part: slice) -> FeatureRecovery:
    metric = FeatureRecovery(rows(12, 8, 0))
    metric.update(rows(30, 8, 1))
    metric.update(rows(30, 8, 1), Codes.from_dense(sparse(300, 30, 0.2, 2)[part]), Codes.from_dense(sparse(300, 12, 0.3, 3)[part]))
    return metric


def on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(counted(slice(0, 110) if rank == 0 else slice(110, 300)).compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_results_of_one(tmp_path: Path):
    on_two_ranks(on_rank, tmp_path)
    alone = counted(slice(0, 300)).compute()
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [alone, alone]


def test_moving_a_batch_moves_its_features():
    batch = Batch(torch.zeros(2, 3), {"a": 1, "b": 2}, Codes.from_dense(torch.eye(2)))
    elsewhere = batch.to("meta")
    assert elsewhere.features is not None
    assert {x.device.type for x in (elsewhere.activations, elsewhere.features.rows, elsewhere.features.values)} == {"meta"}
    assert elsewhere.features.latents.device.type == "meta" and batch.select_hook("b").features is batch.features
    assert Batch(torch.zeros(2, 3)).to("meta").features is None


QUIET: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}


def held_out(folder: Path, data: Any, module: JointSAE) -> dict[str, float]:
    run = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=[HeldOut()], **QUIET)
    metrics = run.validate(module, **(data if isinstance(data, dict) else {"datamodule": data}), verbose=False)
    return {name: metrics[0][f"val/{name}"] for name in ("mcc", "uniqueness", "precision", "f1") if f"val/{name}" in metrics[0]}


def test_held_out_recovery_is_saelens_on_the_validation_tokens(tmp_path: Path):
    module = JointSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=4))
    data = SyntheticDataModule(PLANTED, tokens=4096, batch_size=512, validation_tokens=2048)
    with torch.no_grad():
        module.primary.W_dec[:24] = data.features
        module.primary.sae.W_enc.copy_(module.primary.W_dec.T)
    codes, features = torch.zeros(2048, 40), torch.zeros(2048, 24)
    for i, batch in enumerate(data.val_dataloader()):
        assert batch.features is not None
        for dense, of in ((codes, module.evaluate(batch).codes), (features, batch.features)):
            dense[512 * i + of.rows, of.latents] = of.values
    expected = of_saelens(codes, features, module.primary.W_dec.detach(), data.features)  # pyright: ignore
    assert held_out(tmp_path, data, module) == pytest.approx({name: expected[name] for name in ("mcc", "uniqueness", "f1")}, abs=1e-6)


def test_mcc_needs_directions_only_and_is_absent_without_known_features(tmp_path: Path):
    module = JointSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=40, k=4))
    data = SyntheticDataModule(PLANTED, tokens=4096, batch_size=512, validation_tokens=2048)
    plain = [batch.activations for batch in data.val_dataloader()]
    data.val_dataloader = lambda: Plain(plain)  # type: ignore[method-assign]
    assert set(held_out(tmp_path, data, module)) == {"mcc", "uniqueness"}
    assert held_out(tmp_path, {"dataloaders": Plain(plain)}, module) == {}


class Plain:
    """Activations and no more; Lightning takes a list for a list of loaders."""

    def __init__(self, batches: list[Tensor]):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)

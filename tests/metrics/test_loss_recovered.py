"""What a model loses by a reconstruction: against transformers' own loss, and at the points where the answer is known."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from metasae_lightning.evaluation.splice import splice
from metasae_lightning.lm import HuggingFaceLM, LanguageModel, TransformerLensLM
from metasae_lightning.metrics import Splice
from tests.helpers.models import save_model

HOOK = "blocks.1.hook_resid_post"
TOKENS = torch.randint(2, 300, (4, 16), generator=torch.Generator().manual_seed(0))
EVERYWHERE = torch.ones_like(TOKENS, dtype=torch.bool)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("m") / "tiny", "gpt2", layers=3))


def loaded(folder: str, kind: type[LanguageModel] = HuggingFaceLM, hook: str = HOOK) -> LanguageModel:
    model = kind(folder, hook, device="cpu")
    model.load()
    return model


def measured(model: LanguageModel, rebuild, where: torch.Tensor = EVERYWHERE, mean: torch.Tensor | None = None) -> dict[str, float]:
    metric = Splice()
    contexts = [(part, None, chosen) for part, chosen in zip(TOKENS.split(2), where.split(2), strict=True)]
    splice(model.complete(), contexts, rebuild, torch.zeros(32) if mean is None else mean, metric)
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("kind", [HuggingFaceLM, TransformerLensLM])
def test_shares_recovered_are_1_for_a_perfect_reconstruction_and_0_for_zeros(folder: str, kind: type[LanguageModel]):
    model = loaded(folder, kind)
    perfect, nothing = measured(model, lambda rows: rows), measured(model, torch.zeros_like)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS, labels=TOKENS).loss.item()
    assert perfect["ce_clean"] == pytest.approx(expected, rel=1e-5)
    assert perfect["ce_sae"] == pytest.approx(expected, rel=1e-5) and perfect["kl"] == pytest.approx(0, abs=1e-6)
    assert perfect["recovered_zero"] == pytest.approx(1) and perfect["recovered_mean"] == pytest.approx(1)
    assert nothing["recovered_zero"] == pytest.approx(0, abs=1e-6) and nothing["kl"] > 0.1
    assert nothing["ce_zero"] == nothing["ce_sae"] == nothing["ce_mean"]


# The residual stream after layer 1 is all that later layers see: replaced by another context's, predictions are that context's.
def test_the_model_continues_from_the_reconstruction(folder: str):
    model = loaded(folder).complete()
    other = loaded(folder).activations(TOKENS.flip(0))
    logits = model.logits(TOKENS, edit=lambda rows: other)
    torch.testing.assert_close(logits, model.logits(TOKENS.flip(0)), rtol=1e-5, atol=1e-5)
    entering = loaded(folder, hook="blocks.0.hook_resid_pre")
    first = entering.activations(TOKENS.flip(0))
    torch.testing.assert_close(entering.complete().logits(TOKENS, edit=lambda rows: first), logits, rtol=1e-5, atol=1e-5)


def test_skipped_positions_keep_their_activations_and_do_not_count(folder: str):
    where = EVERYWHERE.clone()
    where[:, :5] = False
    model = loaded(folder)
    seen = []
    results = measured(model, lambda rows: seen.append(rows) or rows, where)
    expected = torch.cat([model.activations(part)[:, 5:].flatten(0, 1) for part in TOKENS.split(2)])
    torch.testing.assert_close(torch.cat(seen), expected)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits
    losses = torch.nn.functional.cross_entropy(logits[:, 4:-1].flatten(0, 1), TOKENS[:, 5:].flatten())
    assert results["ce_clean"] == pytest.approx(losses.item(), rel=1e-5)
    assert abs(results["ce_zero"] - results["ce_clean"]) > 1e-3


def test_mean_ablation_uses_the_mean_activation(folder: str):
    model = loaded(folder)
    mean = model.activations(TOKENS).flatten(0, 1).mean(0)
    results = measured(model, lambda rows: mean.expand_as(rows), mean=mean)
    assert results["ce_mean"] == pytest.approx(results["ce_sae"]) and results["recovered_mean"] == pytest.approx(0, abs=1e-6)


def test_a_model_cut_at_its_hook_cannot_be_spliced(folder: str, tmp_path: Path):
    with pytest.raises(RuntimeError, match="the layers after the hook are not loaded"):
        loaded(folder).logits(TOKENS)

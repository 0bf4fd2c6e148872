"""Examples, histograms and partners of latents: equal to a search through every token. Promoted tokens: equal to a product of matrices."""

from pathlib import Path
from typing import Any

import pytest
import torch

from metasae_lightning.data.recipe import data_of
from metasae_lightning.evaluation.evaluate import Evaluation, evaluate
from metasae_lightning.evaluation.examples import AFTER, BEFORE, QUANTILES
from metasae_lightning.evaluation.latents_record import HISTOGRAM_BINS, latents_record
from metasae_lightning.evaluation.promoted_tokens import TOKENS, promoted_tokens
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.lm import HuggingFaceLM
from metasae_lightning.metrics import Phi
from tests.evaluation.test_evaluate import QUICK
from tests.helpers.judged import write_run
from tests.helpers.models import save_model

D_SAE = 48


@pytest.fixture(scope="module")
def evaluation_and_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Any]:
    run_folder = write_run(tmp_path_factory.mktemp("examples"), "one")
    data = data_of(run_folder / "config.yaml")
    settings = Settings(**{**QUICK, "critic_seeds": 0, "splice_tokens": 0})
    (evaluation,) = evaluate([load_sae(str(run_folder))], data, settings)
    return evaluation, data.language_model


@pytest.fixture(scope="module")
def record(evaluation_and_model: tuple[Evaluation, Any]) -> dict[str, Any]:
    evaluation, model = evaluation_and_model
    return latents_record(evaluation.collected, model.tokenizer, count=3)


@pytest.fixture(scope="module")
def dense(evaluation_and_model: tuple[Evaluation, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations of every latent on every position of all passages, token ids, and a number for each part of a document in a context."""
    acts, tokens, parts = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for codes, entry in evaluation_and_model[0].collected.codes():
        matrix, owner = torch.zeros(entry["tokens"].numel(), D_SAE), entry["owner"]
        matrix[entry["counted"].flatten().nonzero().flatten()[codes.rows], codes.latents] = codes.values
        context = sum(map(len, parts)) + torch.arange(owner.numel()) // owner.shape[1] * owner.shape[1]
        acts.append(matrix)
        tokens.append(entry["tokens"].flatten())
        parts.append(owner.flatten() * 10**6 + context)
    return torch.cat(acts), torch.cat(tokens), torch.cat(parts)


def test_examples_are_of_the_wanted_quantiles_in_the_text_around_them(
    evaluation_and_model: tuple[Evaluation, Any], record: dict[str, Any], dense: tuple[torch.Tensor, ...]
):
    acts, tokens, parts = dense
    decode = evaluation_and_model[1].tokenizer.decode
    many = 0
    for latent in range(D_SAE):
        fired = acts[:, latent][acts[:, latent] > 0].sort().values
        examples = record["examples"].get(str(latent), [])
        assert bool(len(fired)) == bool(examples)
        values = list[float]()
        for example in examples:
            start, text = record["starts"][example["text"]], record["texts"][example["text"]]
            position = start + example["at"]
            span = range(max(0, position - BEFORE), min(len(acts), position + AFTER + 1))
            around = [place for place in span if parts[place] == parts[position]]
            assert start <= around[0] and around[-1] < start + len(text)
            assert "".join(text) == decode(tokens[start : start + len(text)].tolist(), clean_up_tokenization_spaces=False)
            expected = [[place - start, acts[place, latent].item()] for place in around if acts[place, latent] > 0]
            assert example["fired"] == [[place, pytest.approx(value, rel=1e-2)] for place, value in expected]
            values.append(acts[position, latent].item())
            # The quantile is exact up to a step of the histogram.
            assert example["quantile"] == pytest.approx((fired <= values[-1]).double().mean().item(), abs=0.02 + 8 / max(len(fired), 1))
        assert values == sorted(values, reverse=True)
        if len(fired) >= 60:
            many += 1
            assert values[0] == fired[-1] and examples[0]["quantile"] == 1 and len(examples) == 3 + len(QUANTILES)
            for quantile, value in zip(QUANTILES, values[3:], strict=True):
                assert value == pytest.approx(fired.quantile(quantile).item(), abs=0.15 * fired[-1].item())
    assert many > 10


def test_histograms_and_partners_equal_those_of_all_activations(
    evaluation_and_model: tuple[Evaluation, Any], record: dict[str, Any], dense: tuple[torch.Tensor, ...]
):
    acts = dense[0]
    metric = Phi(D_SAE)
    for codes, _ in evaluation_and_model[0].collected.codes():
        metric.update(codes)
    phi = torch.cat([tile for _, tile in metric.tiles()]).fill_diagonal_(-1)
    for latent in range(D_SAE):
        fired = acts[:, latent][acts[:, latent] > 0]
        histogram = record["histograms"].get(str(latent), [])
        assert sum(histogram) == len(fired)
        if len(fired):
            edges = torch.linspace(0, float(fired.max()), HISTOGRAM_BINS + 1)
            assert histogram == pytest.approx(torch.histogram(fired, edges).hist.tolist(), abs=1)  # a value at an edge
            values, partners = (side.tolist() for side in phi[latent].topk(6))
            expected = [[other, pytest.approx(value, abs=1e-3)] for other, value in zip(partners, values, strict=True) if value > 0]
            assert record["partners"][str(latent)] == expected


def test_promoted_tokens_have_the_largest_logits_through_the_final_norm(evaluation_and_model: tuple[Evaluation, Any]):
    evaluation, model = evaluation_and_model
    subject = evaluation.collected.subject
    root = model.complete()._loaded_root()
    generator = torch.Generator().manual_seed(0)
    gain = torch.rand(subject.W_dec.shape[1], generator=generator) + 0.5
    for norm in (root.model.norm, model._loaded_root().model.norm):
        norm.weight.data.copy_(gain)
    expected = (subject.W_dec * gain) @ root.lm_head.weight.T
    logits = model.logits_of_directions(subject.W_dec)
    assert logits == pytest.approx(expected.numpy(), abs=1e-4 * expected.abs().max().item())
    texts = promoted_tokens(subject, model, range(D_SAE))
    for latent in range(D_SAE):
        for name, sign in (("promoted", 1), ("suppressed", -1)):
            best = (sign * logits[latent]).topk(TOKENS).indices.tolist()
            assert texts[name][str(latent)] == [model.tokenizer.decode([token]) for token in best]
    assert model.logits_of_directions(subject.W_dec[:, 1:]) is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logits_of_a_direction_are_those_that_it_adds_before_the_final_norm(architecture: str, tmp_path: Path):
    save_model(tmp_path / "model", architecture, layers=2)
    model = HuggingFaceLM(str(tmp_path / "model"), "blocks.1.hook_resid_post", device="cpu")
    complete = model.complete()
    tokens, direction = torch.tensor([[5, 6, 7]]), torch.randn(1, complete.d_model, generator=torch.Generator().manual_seed(0))
    # Far along a direction nothing else is left of the activations; a bias of the norm adds the same to both signs.
    plus, minus = (complete.logits(tokens, edit=lambda x, sign=sign: x + sign * 1e6 * direction)[0, -1] for sign in (1, -1))
    added = complete.logits_of_directions(direction)
    assert added is not None
    assert torch.nn.functional.cosine_similarity((plus - minus) / 2, added[0], dim=0) > 0.9999

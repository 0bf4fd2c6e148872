"""Dashboards for SAEDashboard and Neuronpedia: the entries that SAEDashboard's reader takes, equal to direct computations."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metasae_lightning.cli import main
from metasae_lightning.evaluation.dashboards import layer_of
from metasae_lightning.evaluation.saes import load_sae
from tests.helpers.judged import write_run

# The arguments of SAEDashboard 0.8's `NeuronpediaDashboardBatch`, `...Feature` and `...Activation`.
BATCH = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
FEATURE = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero"),
    *("freq_hist_data_bar_values", "freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist", "vector"),
}
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
D_SAE = 48


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("dashboards"), "one", dataset_path="some text")
    words = ["--model_id", "tiny", "--sae_set", "res-mine", "--contexts", "2", "--latents_per_file", "20", "--tokens", "600"]
    assert main(["export-dashboard", str(run), *words]) == 0
    return run


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def features(run: Path) -> list[dict[str, Any]]:
    files = sorted((run / "dashboards").glob("batch-*.json"))
    assert len(files) == 3
    return [feature for file in files for feature in read(file)["features"]]


def test_the_files_have_the_entries_of_saedashboard(exported: Path):
    batch = read(exported / "dashboards" / "batch-0.json")
    assert set(batch) == BATCH and (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 1, "res-mine")
    assert len(batch["features"]) == 20
    for feature in features(exported):
        assert set(feature) == FEATURE and (feature["dataset"], feature["n_tokens_in_prompt"]) == ("some text", 16)
        assert 1 <= len(feature["activations"]) <= 2 and all(set(activation) == ACTIVATION for activation in feature["activations"])
    skipped = read(exported / "dashboards" / "skipped_indexes.json")
    assert skipped["layer"] == "1"
    assert sorted([*skipped["skipped_indexes"], *(feature["feature_index"] for feature in features(exported))]) == list(range(D_SAE))


def test_firings_tokens_and_decoder_rows_are_those_of_the_sae(exported: Path):
    W_dec = load_sae(str(exported)).W_dec
    for feature in features(exported):
        row, best = W_dec[feature["feature_index"]], feature["activations"][0]
        assert row[feature["neuron_alignment_indices"]].tolist() == pytest.approx(row.topk(3).values.tolist())
        assert feature["neuron_alignment_l1"][0] == pytest.approx((row.max() / row.abs().sum()).item(), abs=1e-3)
        # The strongest activation is the largest of the histogram, at the place that the first context names.
        assert best["values"][best["qualifying_token_index"]] == pytest.approx(best["bin_max"], rel=0.01)
        width = np.diff(feature["freq_hist_data_bar_values"][:2])[0]
        assert feature["freq_hist_data_bar_values"][-1] + width / 2 == pytest.approx(best["bin_max"], abs=0.01)
        count, tokens = sum(feature["freq_hist_data_bar_heights"]), feature["n_prompts_total"] * 16
        assert 0.5 * tokens < count / feature["frac_nonzero"] <= tokens


def test_the_promoted_tokens_are_the_unembeddings_largest(exported: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = exported.parent / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for feature in features(exported)[:5]:
        row = load_sae(str(exported)).W_dec[feature["feature_index"]]
        logits = (row * model.model.norm.weight.detach()) @ model.lm_head.weight.detach().T
        assert feature["pos_values"] == pytest.approx(logits.topk(10).values.tolist(), abs=2e-3)
        assert feature["neg_values"] == pytest.approx(logits.topk(10, largest=False).values.tolist(), abs=2e-3)
        assert feature["pos_str"][0].strip() == tokenizer.decode([int(logits.argmax())]).strip()


def test_a_second_export_replaces_dashboards_and_nothing_else(exported: Path, capsys: pytest.CaptureFixture[str]):
    (exported / "dashboards" / "batch-9.json").write_text("{}")
    words = ["export-dashboard", str(exported), "--contexts", "1", "--tokens", "600"]
    assert main([*words, "--latents_per_file", "20", "--out", str(exported / "dashboards")]) == 0
    assert not (exported / "dashboards" / "batch-9.json").exists()
    assert main([*words, "--out", str(exported / "saes")]) == 2
    assert "holds something other than dashboards" in capsys.readouterr().err and (exported / "saes" / "primary" / "cfg.json").exists()


@pytest.mark.parametrize(("words", "message"), [(["--tokens", "0"], "tokens must be at least 1"), (["--contexts", "0"], "contexts must")])
def test_a_mistake_is_one_line(words: list[str], message: str, exported: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["export-dashboard", str(exported), *words]) == 2
    assert capsys.readouterr().err.startswith(f"metasae: error: {message}")


def test_a_hook_without_a_layer_has_no_dashboard():
    with pytest.raises(ValueError, match="names no layer"):
        layer_of("synthetic")
    assert layer_of("transformer.h.7") == 7

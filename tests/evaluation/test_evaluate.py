"""Evaluation: its figures equal SAELens's and those computed from all activations at once; it resumes and reuses cached results."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from metasae_lightning import ActivationsDataModule, functional
from metasae_lightning.cli import main
from metasae_lightning.corpora import InMemory
from metasae_lightning.data.recipe import data_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import collect
from metasae_lightning.evaluation.evaluate import Evaluation, evaluate, phi_by_group, resampled_reconstruction
from metasae_lightning.evaluation.held_out_text import passages
from metasae_lightning.evaluation.saes import EvaluatedSAE, load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.lm import TransformerLensLM
from metasae_lightning.metrics import Phi, PhiSample
from metasae_lightning.step import Batch, Codes
from tests.helpers.judged import D_IN, HOOK, data_config, sae, write_run
from tests.helpers.models import save_model

QUICK: dict[str, Any] = {"critic_seeds": 1, "critic_steps": 5, "splice_tokens": 200, "resamples": 50, "calibration_tokens": 512}


def evaluate_runs(*run_folders: Path, **changes: Any) -> list[Evaluation]:
    return evaluate(
        [load_sae(str(run_folder)) for run_folder in run_folders], data_of(run_folders[0] / "config.yaml"), Settings(**{**QUICK, **changes})
    )


class TokenStore:
    """A store with the part of SAELens's ActivationsStore that `run_evals` calls: batches of tokens."""

    context_size, store_batch_size_prompts = 16, 8

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.position = tokens, 0

    def get_batch_tokens(self, count: int) -> torch.Tensor:
        self.position += count
        return self.tokens[self.position - count : self.position]

    def reset_input_dataset(self) -> None:
        self.position = 0


# The tokenizer has no special tokens: both evaluations then count every token and splice the same positions.
def test_figures_equal_those_of_saelens_run_evals(tmp_path: Path):
    folder = save_model(tmp_path / "plain", "gpt2", layers=3, bos=False, eos=False)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 300, (90,), generator=generator).tolist() for _ in range(60)]
    shape: dict[str, Any] = {"batch_size": 64, "context_size": 16, "buffer_size": 256, "held_out": 0.4, "forward_batch": 8}
    model = TransformerLensLM(str(folder), HOOK, device="cpu")
    data = ActivationsDataModule(
        model, InMemory(texts, "random"), tokens=64, prepend_bos=False, cross_document_attention=True, test_tokens=512, **shape
    )
    subject = EvaluatedSAE("it", "it", tmp_path / "it", sae(model_name=str(folder), hook_name=HOOK, threshold=1.0))
    (evaluation,) = evaluate([subject], data, Settings(**{**QUICK, "splice_tokens": 512 - 512 // 16}))
    tokens = torch.cat([passage.tokens for passage in passages(data.stream("test", 512), 512)])
    assert len(tokens) == 32 and evaluation.entry["tokens"] == 512 and evaluation.entry["spliced_tokens"] == 32 * 15
    all_measures = EvalConfig(
        **{"n_eval_reconstruction_batches": 4, "n_eval_sparsity_variance_batches": 4, "batch_size_prompts": 8},
        **dict.fromkeys([f"compute_{name}" for name in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")], True),
    )
    store: Any = TokenStore(tokens)
    theirs, _ = run_evals(
        subject.sae, store, model.complete()._loaded_root(), ActivationScaler(), all_measures, exclude_special_tokens=False
    )
    ours, splice = evaluation.entry["figures"]["reconstruction"], evaluation.entry["figures"]["splice"]
    quality, preservation = theirs["reconstruction_quality"], theirs["model_performance_preservation"]
    assert 0.2 < ours["fvu"] < 5 and ours["fvu"] == pytest.approx(1 - quality["explained_variance"], abs=1e-4)
    assert ours["cosine"] == pytest.approx(quality["cossim"], abs=1e-4)
    assert ours["l2_ratio"] == pytest.approx(theirs["shrinkage"]["l2_ratio"], abs=1e-4)
    # SAELens averages the ratios of batches, hence the tolerance.
    assert ours["gamma"] == pytest.approx(theirs["shrinkage"]["relative_reconstruction_bias"], rel=1e-3)
    assert (ours["l0"], ours["l1"]) == (pytest.approx(theirs["sparsity"]["l0"]), pytest.approx(theirs["sparsity"]["l1"], rel=1e-5))
    assert splice["ce_sae"] == pytest.approx(preservation["ce_loss_with_sae"], abs=1e-3)
    assert splice["ce_clean"] == pytest.approx(preservation["ce_loss_without_sae"], abs=1e-3)
    assert splice["ce_zero"] == pytest.approx(preservation["ce_loss_with_ablation"], abs=1e-3)
    assert splice["recovered_zero"] == pytest.approx(preservation["ce_loss_score"], abs=1e-3)
    assert abs(splice["ce_sae"] - splice["ce_clean"]) > 0.02


def test_figures_of_streamed_passages_equal_those_of_all_activations_at_once(tmp_path: Path):
    run_folder = write_run(tmp_path, "one")
    (evaluation,) = evaluate_runs(run_folder)
    data = data_of(run_folder / "config.yaml")
    data.setup()
    stream = data.stream("test", 700)
    x = torch.cat([passage.read()[0] for passage in passages(stream, 700)])
    exported = SAE.load_from_disk(run_folder / "saes" / "primary")
    acts = exported.encode(x)
    figures = evaluation.entry["figures"]
    assert evaluation.entry["tokens"] == len(x) >= 700
    assert 200 <= evaluation.entry["spliced_tokens"] < 200 + 16
    assert figures["reconstruction"]["fvu"] == pytest.approx(functional.fvu(x, exported.decode(acts)).item(), rel=1e-5)
    assert figures["reconstruction"]["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item())
    assert figures["latents"]["dead"] == pytest.approx(((acts > 0).sum(0) == 0).float().mean().item())
    assert sum(figures["latents"]["log10_density"]["latents"]) == int((acts > 0).any(0).sum())
    phi = Phi(48)
    phi.update(Codes.from_dense(acts))
    pairs = figures["phi"].pop("log10_abs")
    assert figures["phi"] == pytest.approx({name: value.item() for name, value in phi.compute().items()}, rel=1e-9)
    assert sum(pairs["pairs"]) == figures["phi"]["pairs"] and len(pairs["edges"]) == len(pairs["pairs"]) + 1
    # The histogram counts each pair in its bin; at a bin's edge, rounding may put a pair into the next one.
    (full_phi,) = [tile for _, tile in phi.tiles()]
    upper = full_phi.triu(1)[
        torch.triu(torch.ones(48, 48), 1).bool() & (phi.firings()[0].counts > 0).outer(phi.firings()[0].counts > 0)
    ].abs()
    above = [int((upper >= 10.0**edge).sum()) for edge in pairs["edges"][1:-1]]
    counted = [sum(pairs["pairs"][edge:]) for edge in range(1, len(pairs["pairs"]))]
    assert max(abs(direct - binned) for direct, binned in zip(above, counted, strict=True)) <= 3
    low, high = evaluation.entry["intervals"]["fvu"]
    assert low < figures["reconstruction"]["fvu"] < high
    low, high = evaluation.entry["intervals"]["phi_excess"]
    assert low < high and evaluation.entry["documents"] > 10


# `passage.documents` numbers tokens by document: the tokens of one number decode to one text, and numbers count up from 0.
def test_passages_number_tokens_by_document(tmp_path: Path):
    run_folder = write_run(tmp_path, "one")
    data = data_of(run_folder / "config.yaml")
    data.setup()
    texts: dict[int, list[int]] = {}
    special = set(data.language_model.tokenizer.all_special_ids)
    for passage in passages(data.stream("test", 700), 700):
        _, counted = passage.read()
        assert torch.equal(counted, torch.isin(passage.tokens, torch.tensor(sorted(special)), invert=True))
        for document in passage.documents.unique().tolist():
            in_document = counted & (passage.documents == document)
            texts.setdefault(document, []).extend(passage.tokens[in_document].tolist())
    decoded = [data.language_model.tokenizer.decode(tokens) for tokens in texts.values()]
    assert all(text.startswith("document ") and text.count("document ") == 1 for text in decoded[:-1])
    assert list(texts) == list(range(len(texts)))


def test_an_interrupted_evaluation_resumes_with_equal_results_and_encodes_no_passage_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uninterrupted_run, interrupted_run = write_run(tmp_path, "whole"), write_run(tmp_path, "stopped")
    encoded: list[int] = []
    encode_passage = collect.encode_passage

    def encode_and_interrupt(subject: Any, passage: Any, *args: Any) -> Any:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(passage.number)
        return encode_passage(subject, passage, *args)

    monkeypatch.setattr(collect, "encode_passage", encode_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate_runs(interrupted_run)
    monkeypatch.setattr(collect, "encode_passage", lambda *args: encoded.append(args[1].number) or encode_passage(*args))
    (resumed,) = evaluate_runs(interrupted_run)
    passages = len(resumed.collected.text_hashes)
    assert encoded == list(range(passages)) and passages > 4
    assert [name.name for name in (interrupted_run / "evaluation").glob(".*")] == []
    monkeypatch.setattr(collect, "encode_passage", lambda *_: pytest.fail("a cached passage was encoded again"))
    monkeypatch.setattr(
        "metasae_lightning.metrics.decomposition.Decomposition.variance_explained",
        lambda *_: pytest.fail("a cached critic was trained again"),
    )
    monkeypatch.setattr("metasae_lightning.evaluation.collect.losses", lambda *_: pytest.fail("cached spliced losses were computed again"))
    (cached,) = evaluate_runs(interrupted_run)
    monkeypatch.undo()
    (uninterrupted,) = evaluate_runs(uninterrupted_run)
    for other in (resumed, cached):
        assert {**other.entry, "sae": "", "together_with": ""} == {**uninterrupted.entry, "sae": "", "together_with": ""}


def test_several_saes_are_evaluated_at_a_common_l0_and_one_at_its_stored_thresholds(tmp_path: Path):
    run_a, run_b = write_run(tmp_path, "one", k=6.0), write_run(tmp_path, "two", seed=1, k=9.0)
    evaluations = evaluate_runs(run_a, run_b, tokens=1500)
    for evaluation in evaluations:
        assert evaluation.entry["rule"]["rule"] == "rate" and evaluation.entry["rule"]["l0"] == 6.0
        assert evaluation.entry["rule"]["l0_on_validation"] == pytest.approx(6.0, rel=0.02)
        assert evaluation.entry["figures"]["reconstruction"]["l0"] == pytest.approx(6.0, rel=0.1)
    entry_alone = evaluate_runs(run_a)[0].entry
    assert entry_alone["rule"] == {"rule": "stored"} and entry_alone["figures"]["reconstruction"]["l0"] > 7
    (at_l0_3,) = evaluate_runs(run_a, rule="global", l0=3.0)
    assert at_l0_3.entry["figures"]["reconstruction"]["l0"] == pytest.approx(3.0, rel=0.1)
    # Evaluation sets thresholds on the SAE in memory and leaves the folder unchanged.
    assert SAE.load_from_disk(run_a / "saes" / "primary").threshold.unique().tolist() == [0.5]


def test_bootstrap_of_fvu_has_the_standard_error_of_the_delta_method_over_documents(tmp_path: Path):
    run_folder = write_run(tmp_path, "one")
    (evaluation,) = evaluate_runs(run_folder, resamples=2000)
    ids, sums, total = evaluation.collected.by_document
    tokens, squares, error = sums[:, 0].sum(), sums[:, 1].sum(), sums[:, 2].sum()
    fvu = error / (squares - total.sum(0).square().sum() / tokens)
    assert fvu.item() == pytest.approx(evaluation.entry["figures"]["reconstruction"]["fvu"], rel=1e-9)
    # Standard error of a ratio of sums by the delta method, from the residuals of documents.
    centre = total.sum(0) / tokens
    spread = sums[:, 1] - 2 * total @ centre + sums[:, 0] * centre.square().sum()
    standard_error = (sums[:, 2] - fvu * spread).std() * len(ids) ** 0.5 / spread.sum()
    values = resampled_reconstruction(evaluation.collected, Settings(**{**QUICK, "resamples": 2000}))["fvu"]
    assert values.std().item() == pytest.approx(standard_error.item(), rel=0.1)
    assert values.mean().item() == pytest.approx(fvu.item(), abs=0.2 * standard_error.item())


def test_the_command_prints_a_table_and_writes_the_record_and_tensorboard_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "140")
    run_folder = write_run(tmp_path, "one")
    (run_folder / "evaluation.json").write_text('{"validation": {"fvu": 0.5}}')
    args = [f"--{name}={value}" for name, value in QUICK.items()]
    assert main(["test", str(run_folder), *args]) == 0
    table = capsys.readouterr().out
    record = json.loads((run_folder / "evaluation.json").read_text())
    entry = record["evaluation"]
    assert record["validation"] == {"fvu": 0.5}
    assert f"{entry['figures']['reconstruction']['fvu']:.4f} (" in table and "fresh critic explains" in table
    assert set(entry["figures"]) == {"reconstruction", "latents", "phi", "decoder", "critic", "splice"}
    assert entry["versions"]["torch"] == torch.__version__ and entry["data"]["corpus"].endswith("text.jsonl")
    assert entry["settings"]["critic_seeds"] == 1 and entry["hook"] == HOOK and entry["sae"] == str(run_folder)
    assert list((run_folder / "tensorboard").glob("events.*"))


def test_a_saelens_folder_is_evaluated_on_the_model_and_dataset_in_its_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_folder = write_run(tmp_path, "one")
    folder = tmp_path / "published"
    metadata = {"dataset_path": str(tmp_path / "text.jsonl"), "context_size": 16, "hf_hook_name": "model.layers.1"}
    sae(model_name=str(tmp_path / "model"), hook_name=HOOK, **metadata).save_model(folder)
    monkeypatch.chdir(tmp_path)
    args = [f"--{name}={value}" for name, value in {**QUICK, "tokens": 300}.items()]
    assert main(["test", "--sae", str(folder), *args]) == 0
    (record,) = (tmp_path / "runs").glob("evaluation-published-*/evaluation.json")
    entry = json.loads(record.read_text())["evaluation"]
    assert entry["tokens"] >= 300 and entry["data"]["corpus"] == str(tmp_path / "text.jsonl")
    assert not (folder / "evaluation").exists()
    assert main(["test", str(folder), "--data", str(run_folder / "config.yaml"), "--out", str(tmp_path / "out"), *args]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["evaluation"]["data"]["held_out"] == 0.2


def test_settings_out_of_range_are_refused():
    refused = {
        "critic_seeds": (-1, "at least 0"),
        "l0": (-1.0, "more than 0"),
        "tokens": (0, "at least 1"),
        "pairs_gib": (0.0, "more than 0"),
    }
    for name, (value, requirement) in refused.items():
        with pytest.raises(InputError, match=f"{name} must be {requirement}"):
            Settings(**{name: value})


def test_calibrate_writes_thresholds_that_give_the_training_l0(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run_folder = write_run(tmp_path, "one", k=5.0)
    weights = (run_folder / "saes" / "primary" / "sae_weights.safetensors").read_bytes()
    assert main(["calibrate", str(run_folder), "--calibration_tokens", "512"]) == 0
    calibrated = SAE.load_from_disk(run_folder / "saes" / "primary")
    data = data_of(run_folder / "config.yaml")
    data.setup()
    x = torch.cat([Batch.of(batch).activations for batch in data.stream("validation", 512)])
    assert (calibrated.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(5.0, rel=0.02)
    rule = calibrated.cfg.metadata.threshold_rule
    assert calibrated.cfg.metadata.l0 == rule["l0"]
    assert rule["rule"] == "rate" and rule["target_l0"] == 5.0 and rule["l0_before"] > 6 and rule["tokens"] == len(x)
    assert json.loads((run_folder / "evaluation.json").read_text())["calibration"] == rule
    assert calibrated.threshold.unique().numel() > 10 and calibrated.W_enc.shape == (D_IN, 48)
    assert (run_folder / "saes" / "primary" / "sae_weights.safetensors").read_bytes() != weights
    assert [path.name for path in (run_folder / "saes").iterdir()] == ["primary"]
    assert "L0" in capsys.readouterr().out


def test_excess_phi_over_all_document_groups_equals_that_of_the_sample(tmp_path: Path):
    (evaluation,) = evaluate_runs(write_run(tmp_path, "one"))
    counts, sample = phi_by_group(evaluation.collected), PhiSample(48, matchings=32)
    for codes, _ in evaluation.collected.codes():
        sample.update(codes)
    excess = counts.excess(torch.ones(1, len(counts.tokens), dtype=torch.float64)).item()
    assert excess == pytest.approx(sample.compute()["excess"].item(), rel=1e-9)
    # The interval is centred on the excess over all pairs, which the record gives with it.
    low, high = evaluation.entry["intervals"]["phi_excess"]
    assert (low + high) / 2 == pytest.approx(evaluation.entry["figures"]["phi"]["excess"], rel=1e-6)


# The text file is rewritten under the same name: cached results of the old text must not be used.
def test_changed_text_invalidates_cached_results(tmp_path: Path):
    run_folder = write_run(tmp_path, "one")
    (before,) = evaluate_runs(run_folder, rule="global")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{line['text']} changed"}) + "\n" for line in map(json.loads, text.read_text().splitlines()))
    )
    (after,) = evaluate_runs(run_folder, rule="global")
    fresh = write_run(tmp_path, "fresh")
    (expected,) = evaluate_runs(fresh, rule="global")
    assert after.entry["figures"] == expected.entry["figures"] and after.entry["rule"] == expected.entry["rule"]
    assert after.entry["figures"]["reconstruction"]["fvu"] != before.entry["figures"]["reconstruction"]["fvu"]


def test_evaluation_leaves_out_first_positions_and_large_norms_as_training_did(tmp_path: Path):
    run_folder = write_run(tmp_path, "one")
    (unfiltered,) = evaluate_runs(run_folder)
    tree = data_config(tmp_path, skip_positions=3, max_norm_ratio=1.2)
    (run_folder / "config.yaml").write_text(yaml.safe_dump({"data": tree}))
    (filtered,) = evaluate_runs(run_folder)
    for passage in filtered.collected.entries():
        assert not passage["counted"][:, :3].any()
        assert len(passage["lengths"]) == int(passage["counted"].sum())
    n_counted = sum(int(passage["counted"].sum()) for passage in filtered.collected.entries())
    n_candidates = sum(int((passage["tokens"][:, 3:] > 1).sum()) for passage in filtered.collected.entries())
    assert 0.5 * n_candidates < n_counted < n_candidates  # about a tenth of the tokens have larger norms
    assert unfiltered.entry["figures"] != filtered.entry["figures"]


def test_bootstrap_over_a_single_document_gives_nan(tmp_path: Path):
    run_folder = write_run(tmp_path, "one")
    (evaluation,) = evaluate_runs(run_folder)
    evaluation.collected.by_document  # noqa: B018
    object.__setattr__(evaluation.collected, "by_document", tuple(part[:1] for part in evaluation.collected.by_document))
    assert resampled_reconstruction(evaluation.collected, Settings(**QUICK))["fvu"].isnan().all()

"""The whole evaluation: against SAELens's own, against figures worked out another way, stopped and gone on with."""

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
from metasae_lightning.cli.arguments import data_of
from metasae_lightning.corpora import InMemory
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation import collect
from metasae_lightning.evaluation.evaluate import Evaluation, evaluate, phi_by_group, resampled_reconstruction
from metasae_lightning.evaluation.held_out_text import passages
from metasae_lightning.evaluation.saes import EvaluatedSAE, load_sae
from metasae_lightning.evaluation.settings import Settings
from metasae_lightning.lm import TransformerLensLM
from metasae_lightning.metrics import Phi, PhiSample
from metasae_lightning.step import Batch, Codes
from tests.helpers.judged import D_IN, HOOK, recipe, run, sae
from tests.helpers.models import save_model

QUICK: dict[str, Any] = {"critic_seeds": 1, "critic_steps": 5, "splice_tokens": 200, "resamples": 50, "calibration_tokens": 512}


def measured(*places: Path, **more: Any) -> list[Evaluation]:
    return evaluate([load_sae(str(place)) for place in places], data_of(places[0] / "config.yaml"), Settings(**{**QUICK, **more}))


class Store:
    """What SAELens's evaluation asks of an activations store: tokens."""

    context_size, store_batch_size_prompts = 16, 8

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.given = tokens, 0

    def get_batch_tokens(self, count: int) -> torch.Tensor:
        self.given += count
        return self.tokens[self.given - count : self.given]

    def reset_input_dataset(self) -> None:
        self.given = 0


# A tokenizer without special tokens: then every token counts in both, and the same positions are replaced.
def test_figures_are_those_of_saelens_run_evals(tmp_path: Path):
    folder = save_model(tmp_path / "plain", "gpt2", layers=3, bos=False, eos=False)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 300, (90,), generator=generator).tolist() for _ in range(60)]
    shape: dict[str, Any] = {"batch_size": 64, "context_size": 16, "buffer_size": 256, "held_out": 0.4, "forward_batch": 8}
    model = TransformerLensLM(str(folder), HOOK, device="cpu")
    data = ActivationsDataModule(
        model, InMemory(texts, "random"), tokens=64, prepend_bos=False, cross_document_attention=True, test_tokens=512, **shape
    )
    judged = EvaluatedSAE("it", "it", tmp_path / "it", sae(model_name=str(folder), hook_name=HOOK, threshold=1.0))
    (found,) = evaluate([judged], data, Settings(**{**QUICK, "splice_tokens": 512 - 512 // 16}))
    tokens = torch.cat([passage.tokens for passage in passages(data.stream("test", 512), 512)])
    assert len(tokens) == 32 and found.entry["tokens"] == 512 and found.entry["spliced_tokens"] == 32 * 15
    everything = EvalConfig(
        **{"n_eval_reconstruction_batches": 4, "n_eval_sparsity_variance_batches": 4, "batch_size_prompts": 8},
        **dict.fromkeys([f"compute_{name}" for name in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")], True),
    )
    store: Any = Store(tokens)
    theirs, _ = run_evals(judged.sae, store, model.complete()._loaded_root(), ActivationScaler(), everything, exclude_special_tokens=False)
    ours, splice = found.entry["figures"]["reconstruction"], found.entry["figures"]["splice"]
    quality, kept = theirs["reconstruction_quality"], theirs["model_performance_preservation"]
    assert 0.2 < ours["fvu"] < 5 and ours["fvu"] == pytest.approx(1 - quality["explained_variance"], abs=1e-4)
    assert ours["cosine"] == pytest.approx(quality["cossim"], abs=1e-4)
    assert ours["l2_ratio"] == pytest.approx(theirs["shrinkage"]["l2_ratio"], abs=1e-4)
    # Theirs is a mean of batches' ratios.
    assert ours["gamma"] == pytest.approx(theirs["shrinkage"]["relative_reconstruction_bias"], rel=1e-3)
    assert (ours["l0"], ours["l1"]) == (pytest.approx(theirs["sparsity"]["l0"]), pytest.approx(theirs["sparsity"]["l1"], rel=1e-5))
    assert splice["ce_sae"] == pytest.approx(kept["ce_loss_with_sae"], abs=1e-3)
    assert splice["ce_clean"] == pytest.approx(kept["ce_loss_without_sae"], abs=1e-3)
    assert splice["ce_zero"] == pytest.approx(kept["ce_loss_with_ablation"], abs=1e-3)
    assert splice["recovered_zero"] == pytest.approx(kept["ce_loss_score"], abs=1e-3)
    assert abs(splice["ce_sae"] - splice["ce_clean"]) > 0.02


def test_figures_are_those_of_all_rows_at_once(tmp_path: Path):
    place = run(tmp_path, "one")
    (found,) = measured(place)
    data = data_of(place / "config.yaml")
    data.setup()
    stream = data.stream("test", 700)
    x = torch.cat([passage.read()[0] for passage in passages(stream, 700)])
    one = SAE.load_from_disk(place / "saes" / "primary")
    acts = one.encode(x)
    figures = found.entry["figures"]
    assert found.entry["tokens"] == len(x) >= 700
    assert 200 <= found.entry["spliced_tokens"] < 200 + 16
    assert figures["reconstruction"]["fvu"] == pytest.approx(functional.fvu(x, one.decode(acts)).item(), rel=1e-5)
    assert figures["reconstruction"]["l0"] == pytest.approx((acts > 0).sum(1).float().mean().item())
    assert figures["latents"]["dead"] == pytest.approx(((acts > 0).sum(0) == 0).float().mean().item())
    assert sum(figures["latents"]["log10_density"]["latents"]) == int((acts > 0).any(0).sum())
    phi = Phi(48)
    phi.update(Codes.from_dense(acts))
    pairs = figures["phi"].pop("log10_abs")
    assert figures["phi"] == pytest.approx({name: value.item() for name, value in phi.compute().items()}, rel=1e-9)
    assert sum(pairs["pairs"]) == figures["phi"]["pairs"] and len(pairs["edges"]) == len(pairs["pairs"]) + 1
    # Every pair in its bin; where the two kinds of bin do not meet, a pair may be in the next.
    (whole,) = [tile for _, tile in phi.tiles()]
    upper = whole.triu(1)[torch.triu(torch.ones(48, 48), 1).bool() & (phi.firings()[0].counts > 0).outer(phi.firings()[0].counts > 0)].abs()
    above = [int((upper >= 10.0**edge).sum()) for edge in pairs["edges"][1:-1]]
    counted = [sum(pairs["pairs"][place:]) for place in range(1, len(pairs["pairs"]))]
    assert max(abs(one - other) for one, other in zip(above, counted, strict=True)) <= 3
    low, high = found.entry["intervals"]["fvu"]
    assert low < figures["reconstruction"]["fvu"] < high
    low, high = found.entry["intervals"]["phi_excess"]
    assert low < high and found.entry["documents"] > 10


# Words are numbered by the documents they are of: no document is in two, and a passage's rows are its own.
def test_passages_know_their_documents(tmp_path: Path):
    place = run(tmp_path, "one")
    data = data_of(place / "config.yaml")
    data.setup()
    texts: dict[int, list[int]] = {}
    special = set(data.language_model.tokenizer.all_special_ids)
    for passage in passages(data.stream("test", 700), 700):
        _, counted = passage.read()
        assert torch.equal(counted, torch.isin(passage.tokens, torch.tensor(sorted(special)), invert=True))
        for document in passage.documents.unique().tolist():
            chosen = counted & (passage.documents == document)
            texts.setdefault(document, []).extend(passage.tokens[chosen].tolist())
    decoded = [data.language_model.tokenizer.decode(tokens) for tokens in texts.values()]
    assert all(text.startswith("document ") and text.count("document ") == 1 for text in decoded[:-1])
    assert list(texts) == list(range(len(texts)))


def test_an_evaluation_that_was_stopped_goes_on_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole, stopped = run(tmp_path, "whole"), run(tmp_path, "stopped")
    looked: list[int] = []
    encode_passage = collect.encode_passage

    def counting(subject: Any, passage: Any, *given: Any) -> Any:
        if len(looked) == 3:
            raise KeyboardInterrupt
        looked.append(passage.number)
        return encode_passage(subject, passage, *given)

    monkeypatch.setattr(collect, "encode_passage", counting)
    with pytest.raises(KeyboardInterrupt):
        measured(stopped)
    monkeypatch.setattr(collect, "encode_passage", lambda *given: looked.append(given[1].number) or encode_passage(*given))
    (gone_on,) = measured(stopped)
    passages = len(gone_on.collected.text_hashes)
    assert looked == list(range(passages)) and passages > 4
    assert [name.name for name in (stopped / "evaluation").glob(".*")] == []
    monkeypatch.setattr(collect, "encode_passage", lambda *_: pytest.fail("measured twice"))
    monkeypatch.setattr(
        "metasae_lightning.metrics.decomposition.Decomposition.variance_explained", lambda *_: pytest.fail("criticised twice")
    )
    monkeypatch.setattr("metasae_lightning.evaluation.collect.losses", lambda *_: pytest.fail("spliced twice"))
    (again,) = measured(stopped)
    monkeypatch.undo()
    (one,) = measured(whole)
    for other in (gone_on, again):
        assert {**other.entry, "sae": "", "together_with": ""} == {**one.entry, "sae": "", "together_with": ""}


def test_several_are_measured_at_matched_l0(tmp_path: Path):
    one, two = run(tmp_path, "one", k=6.0), run(tmp_path, "two", seed=1, k=9.0)
    found = measured(one, two, tokens=1500)
    for evaluation in found:
        assert evaluation.entry["rule"]["rule"] == "rate" and evaluation.entry["rule"]["l0"] == 6.0
        assert evaluation.entry["rule"]["l0_on_validation"] == pytest.approx(6.0, rel=0.02)
        assert evaluation.entry["figures"]["reconstruction"]["l0"] == pytest.approx(6.0, rel=0.1)
    alone = measured(one)[0].entry
    assert alone["rule"] == {"rule": "stored"} and alone["figures"]["reconstruction"]["l0"] > 7
    (other,) = measured(one, rule="global", l0=3.0)
    assert other.entry["figures"]["reconstruction"]["l0"] == pytest.approx(3.0, rel=0.1)
    # Thresholds are set on the SAE in memory: the folder is as it was.
    assert SAE.load_from_disk(one / "saes" / "primary").threshold.unique().tolist() == [0.5]


def test_intervals_are_what_other_documents_would_have_given(tmp_path: Path):
    place = run(tmp_path, "one")
    (found,) = measured(place, resamples=2000)
    ids, sums, total = found.collected.by_document
    tokens, squares, error = sums[:, 0].sum(), sums[:, 1].sum(), sums[:, 2].sum()
    fvu = error / (squares - total.sum(0).square().sum() / tokens)
    assert fvu.item() == pytest.approx(found.entry["figures"]["reconstruction"]["fvu"], rel=1e-9)
    # The ratio's standard error by the delta method: the residuals of documents.
    centre = total.sum(0) / tokens
    spread = sums[:, 1] - 2 * total @ centre + sums[:, 0] * centre.square().sum()
    error_of_documents = (sums[:, 2] - fvu * spread).std() * len(ids) ** 0.5 / spread.sum()
    values = resampled_reconstruction(found.collected, Settings(**{**QUICK, "resamples": 2000}))["fvu"]
    assert values.std().item() == pytest.approx(error_of_documents.item(), rel=0.1)
    assert values.mean().item() == pytest.approx(fvu.item(), abs=0.2 * error_of_documents.item())


def test_the_command_prints_a_table_and_keeps_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "140")
    place = run(tmp_path, "one")
    (place / "evaluation.json").write_text('{"validation": {"fvu": 0.5}}')
    args = [f"--{name}={value}" for name, value in QUICK.items()]
    assert main(["test", str(place), *args]) == 0
    table = capsys.readouterr().out
    record = json.loads((place / "evaluation.json").read_text())
    entry = record["evaluation"]
    assert record["validation"] == {"fvu": 0.5}
    assert f"{entry['figures']['reconstruction']['fvu']:.4f} (" in table and "fresh critic explains" in table
    assert set(entry["figures"]) == {"reconstruction", "latents", "phi", "decoder", "critic", "splice"}
    assert entry["versions"]["torch"] == torch.__version__ and entry["data"]["corpus"].endswith("text.jsonl")
    assert entry["settings"]["critic_seeds"] == 1 and entry["hook"] == HOOK and entry["sae"] == str(place)
    assert list((place / "tensorboard").glob("events.*"))


def test_any_saelens_folder_is_measured_on_what_it_says_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = run(tmp_path, "one")
    folder = tmp_path / "published"
    told = {"dataset_path": str(tmp_path / "text.jsonl"), "context_size": 16, "hf_hook_name": "model.layers.1"}
    sae(model_name=str(tmp_path / "model"), hook_name=HOOK, **told).save_model(folder)
    monkeypatch.chdir(tmp_path)
    args = [f"--{name}={value}" for name, value in {**QUICK, "tokens": 300}.items()]
    assert main(["test", "--sae", str(folder), *args]) == 0
    (record,) = (tmp_path / "runs").glob("evaluation-published-*/evaluation.json")
    entry = json.loads(record.read_text())["evaluation"]
    assert entry["tokens"] >= 300 and entry["data"]["corpus"] == str(tmp_path / "text.jsonl")
    assert not (folder / "evaluation").exists()
    assert main(["test", str(folder), "--data", str(place / "config.yaml"), "--out", str(tmp_path / "out"), *args]) == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["evaluation"]["data"]["held_out"] == 0.2


def test_settings_that_cannot_be_are_refused():
    refused = {
        "critic_seeds": (-1, "at least 0"),
        "l0": (-1.0, "more than 0"),
        "tokens": (0, "at least 1"),
        "memory_gib": (0.0, "more than 0"),
    }
    for name, (value, says) in refused.items():
        with pytest.raises(InputError, match=f"{name} must be {says}"):
            Settings(**{name: value})


def test_calibrating_sets_the_folder_to_its_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = run(tmp_path, "one", k=5.0)
    weights = (place / "saes" / "primary" / "sae_weights.safetensors").read_bytes()
    assert main(["calibrate", str(place), "--calibration_tokens", "512"]) == 0
    one = SAE.load_from_disk(place / "saes" / "primary")
    data = data_of(place / "config.yaml")
    data.setup()
    x = torch.cat([Batch.of(batch).activations for batch in data.stream("validation", 512)])
    assert (one.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(5.0, rel=0.02)
    told = one.cfg.metadata.threshold_rule
    assert told["rule"] == "rate" and told["target_l0"] == 5.0 and told["l0_before"] > 6 and told["tokens"] == len(x)
    assert json.loads((place / "evaluation.json").read_text())["calibration"] == told
    assert one.threshold.unique().numel() > 10 and one.W_enc.shape == (D_IN, 48)
    assert (place / "saes" / "primary" / "sae_weights.safetensors").read_bytes() != weights
    assert [path.name for path in (place / "saes").iterdir()] == ["primary"]
    assert "L0" in capsys.readouterr().out


def test_the_groups_of_documents_add_up_to_the_sample(tmp_path: Path):
    (found,) = measured(run(tmp_path, "one"))
    counts, sample = phi_by_group(found.collected), PhiSample(48, matchings=32)
    for codes, _ in found.collected.codes():
        sample.update(codes)
    whole = counts.excess(torch.ones(1, len(counts.tokens), dtype=torch.float64)).item()
    assert whole == pytest.approx(sample.compute()["excess"].item(), rel=1e-9)
    # The interval is around the figure of all pairs, which stands beside it.
    low, high = found.entry["intervals"]["phi_excess"]
    assert (low + high) / 2 == pytest.approx(found.entry["figures"]["phi"]["excess"], rel=1e-6)


# A corpus that changed under its name is other text: nothing that was measured on the old may be read.
def test_text_that_changed_is_measured_anew(tmp_path: Path):
    place = run(tmp_path, "one")
    (before,) = measured(place, rule="global")
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{line['text']} changed"}) + "\n" for line in map(json.loads, text.read_text().splitlines()))
    )
    (after,) = measured(place, rule="global")
    fresh = run(tmp_path, "fresh")
    (expected,) = measured(fresh, rule="global")
    assert after.entry["figures"] == expected.entry["figures"] and after.entry["rule"] == expected.entry["rule"]
    assert after.entry["figures"]["reconstruction"]["fvu"] != before.entry["figures"]["reconstruction"]["fvu"]


def test_positions_and_sinks_that_training_left_out_are_left_out(tmp_path: Path):
    place = run(tmp_path, "one")
    (plain,) = measured(place)
    tree = recipe(tmp_path, skip_positions=3, max_norm_ratio=1.2)
    (place / "config.yaml").write_text(yaml.safe_dump({"data": tree}))
    (found,) = measured(place)
    for one in found.collected.entries():
        assert not one["counted"][:, :3].any()
        assert len(one["lengths"]) == int(one["counted"].sum())
    kept = sum(int(one["counted"].sum()) for one in found.collected.entries())
    texts = sum(int((one["tokens"][:, 3:] > 1).sum()) for one in found.collected.entries())
    assert 0.5 * texts < kept < texts  # a tenth or so have larger norms
    assert plain.entry["figures"] != found.entry["figures"]


def test_of_one_document_nothing_is_said_of_others(tmp_path: Path):
    place = run(tmp_path, "one")
    (found,) = measured(place)
    found.collected.by_document  # noqa: B018
    object.__setattr__(found.collected, "by_document", tuple(part[:1] for part in found.collected.by_document))
    assert resampled_reconstruction(found.collected, Settings(**QUICK))["fvu"].isnan().all()

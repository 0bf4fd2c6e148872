"""The whole study on a tiny model: three arms, a judge, records and tables."""

import csv
import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metasae_lightning.cli.judge import codes_on_test_text
from metasae_lightning.data.recipe import data_of
from metasae_lightning.errors import InputError
from metasae_lightning.evaluation.saes import load_sae
from metasae_lightning.judging.judges.ledger import JudgeWithLedger, Ledger
from metasae_lightning.judging.judges.questions import Cost
from metasae_lightning.judging.records import write_results
from metasae_lightning.judging.settings import JudgingSettings
from metasae_lightning.judging.study import JudgingResults, judge_arms, public_settings
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.run_folder import read_record
from tests.helpers.judged import data_config, write_run
from tests.helpers.judges import OracleJudge, RandomJudge
from tests.helpers.models import documents

SETTINGS = JudgingSettings(tokens=6000, latents=8, scoring=6, explaining=6, seeds=2, resamples=50, pair_cosine=-1.0, splits=3)
FEW = replace(SETTINGS, scores=["detection", "intruder"], seeds=1, splits=0)


def embed(texts: Any) -> Tensor:
    """Counts of letters, of unit length."""
    counts = torch.tensor([[float(text.count(chr(letter))) for letter in range(97, 123)] for text in texts])
    return torch.nn.functional.normalize(counts, dim=1)


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any]:
    folder = tmp_path_factory.mktemp("study")
    data_config(folder)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(1200)))
    runs = [write_run(folder, name, seed=seed) for name, seed in (("solo", 0), ("twin", 0), ("other", 1))]
    saes = [load_sae(str(run)) for run in runs]
    for sae in saes:
        sae.sae.threshold.data.fill_(3.0)
    data = data_of(runs[0] / "config.yaml")
    collected = codes_on_test_text(saes, data, SETTINGS)
    return {codes.subject.name: codes for codes in collected}, data.language_model


@pytest.fixture(scope="module")
def study(arms: tuple[dict[str, Any], Any]) -> JudgingResults:
    return judge_arms(*arms, RandomJudge(), embed, SETTINGS)


def test_the_same_sae_scores_the_same(study: JudgingResults):
    # `twin` is `solo` again: each sampled latent is its own pair, and every difference is 0.
    solo, twin, _ = study.arms
    against = twin.entry["against"]["scores"]
    assert twin.entry["against"]["arm"] == "solo" and against
    for name, difference in against.items():
        assert difference["paired"]["value"] == 0 or math.isnan(difference["paired"]["value"]), name
    pairs = {latent: found["pair"] for latent, found in twin.record["latents"].items() if found["pair"]}
    assert pairs and all(int(latent) == pair["latent"] and pair["cosine"] == pytest.approx(1) for latent, pair in pairs.items())
    assert set(solo.record["latents"]) <= set(twin.record["latents"])


def test_means_are_those_of_the_sampled_latents(study: JudgingResults):
    for arm in study.arms:
        sampled = [found for found in arm.record["latents"].values() if found["chosen_as"] == "sample"]
        assert len(sampled) == arm.entry["sampled"]
        for name, entry in arm.entry["scores"].items():
            values = [found["scores"][name] for found in sampled]
            known = [value for value in values if math.isfinite(value)]
            assert entry["mean"]["latents"] == len(known)
            assert not known or entry["mean"]["value"] == pytest.approx(np.mean(known))


def test_repeating_asks_nothing_and_changes_nothing(arms: tuple[dict[str, Any], Any], tmp_path: Path):
    results: list[JudgingResults] = []
    for _ in range(2):
        ledger = Ledger(tmp_path / "answers.sqlite")
        results.append(judge_arms(*arms, JudgeWithLedger(RandomJudge(), ledger), embed, FEW))
        ledger.close()
    first, second = results
    assert first.cost.requests > 0 and second.cost.requests == 0
    for a, b in zip(first.arms, second.arms, strict=True):
        assert json.dumps({**a.entry, "cost": None}) == json.dumps({**b.entry, "cost": None}) and json.dumps(a.record) == json.dumps(
            b.record
        )


# The embedder adds a pass at each call; what the judge itself costs is the same with and without it.
def test_the_embedders_cost_is_beside_the_judges(arms: tuple[dict[str, Any], Any], tmp_path: Path):
    cost = Cost()

    def counted(texts: Any) -> Tensor:
        cost.requests += 1
        return embed(texts)

    settings = replace(FEW, scores=["detection", "topical_coherence"])
    result = judge_arms(*arms, RandomJudge(), counted, settings, embedder_cost=cost)
    alone = judge_arms(*arms, RandomJudge(), embed, settings)
    assert result.cost.requests == alone.cost.requests > 0 and alone.entries["solo"]["embedder_cost"] is None
    assert result.entries["other"]["embedder_cost"]["requests"] == cost.requests > 0
    write_results(result, tmp_path)
    assert json.loads((tmp_path / "judging.json").read_text())["embedder_cost"]["requests"] == cost.requests


def test_another_judge_answers_for_itself(arms: tuple[dict[str, Any], Any], tmp_path: Path):
    ledger = Ledger(tmp_path / "answers.sqlite")
    judge_arms(*arms, JudgeWithLedger(RandomJudge(0), ledger), embed, FEW)
    other = judge_arms(*arms, JudgeWithLedger(RandomJudge(1), ledger), embed, FEW)
    alone = judge_arms(*arms, RandomJudge(1), embed, FEW)
    ledger.close()
    assert other.arms[0].entry["scores"]["detection"]["mean"] == alone.arms[0].entry["scores"]["detection"]["mean"]
    assert other.cost.requests == alone.cost.requests or other.cost.reused > 0


def test_results_are_beside_each_sae(study: JudgingResults, tmp_path: Path):
    write_results(study, tmp_path)
    for arm in study.arms:
        subject = arm.collected.subject
        assert read_record(subject.record)["judging"]["sampled"] == arm.entry["sampled"]
        kept = json.loads(gzip.decompress((subject.folder / "judged.json.gz").read_bytes()))
        assert kept["latents"].keys() == arm.record["latents"].keys()
    rows = list(csv.DictReader((tmp_path / "latents.csv").read_text().splitlines()))
    assert len(rows) == sum(len(arm.record["latents"]) for arm in study.arms)
    assert {row["arm"] for row in rows} == {"solo", "twin", "other"}


def test_a_users_explanations_choose_the_latents(arms: tuple[dict[str, Any], Any], study: JudgingResults, tmp_path: Path):
    latent = next(iter(study.arms[0].record["latents"]))
    other = list(study.arms[0].record["latents"])[1]
    file = tmp_path / "mine.csv"
    file.write_text(f'latent,explanation\n{latent},the word "fox"\n{other},"=HYPERLINK(""x"")"\n')
    collected, model = arms
    settings = replace(SETTINGS, explanations=str(file))
    result = judge_arms({"solo": collected["solo"]}, model, OracleJudge(), embed, settings)
    assert {number: found["explanation"] for number, found in result.arms[0].record["latents"].items()} == {
        latent: 'the word "fox"',
        other: '=HYPERLINK(""x"")'.replace('""', '"'),
    }
    write_results(result, tmp_path)
    assert "'=HYPERLINK" in (tmp_path / "latents.csv").read_text()
    with pytest.raises(InputError, match="explains no latent of solo"):
        judge_arms(collected, model, OracleJudge(), embed, settings)


def test_without_explanations_only_scores_that_need_none(arms: tuple[dict[str, Any], Any]):
    collected, model = arms
    settings = replace(SETTINGS, explanations="none")
    result = judge_arms({"solo": collected["solo"]}, model, RandomJudge(), embed, settings)
    assert set(result.arms[0].entry["scores"]) == {"intruder", "topical_coherence", "output"}
    with pytest.raises(InputError, match="scores: 'detection'"):
        judge_arms({"solo": collected["solo"]}, model, RandomJudge(), embed, replace(settings, scores=["detection"]))


def test_an_sae_is_known_by_its_decoder_whatever_its_thresholds(arms: tuple[dict[str, Any], Any], study: JudgingResults):
    # `metasae test` of several arms sets thresholds, which changes the hash of all weights.
    subject = arms[0]["solo"].subject
    assert study.arms[0].entry["decoder"] == study.arms[0].record["decoder"] == subject.decoder_cache_key["decoder"]
    judged = {"judging": study.arms[0].entry}
    for decoder, is_other in ((subject.decoder_cache_key["decoder"], False), ("another", True)):
        arm = Arm("solo", Path("solo"), record={**judged, "evaluation": {"weights": "recalibrated", "decoder": decoder}})
        assert (arm.judging is None) == arm.is_judged_as_another_sae == is_other


def test_no_login_of_the_address_is_in_the_record():
    settings = JudgingSettings(judge="openai", model="m", url="http://me:secret@127.0.0.1:8000/v1?key=hidden")
    assert public_settings(settings)["url"] == "http://127.0.0.1:8000/v1"
    assert public_settings(FEW)["url"] is None


def test_random_activations_say_nothing_about_a_judge_of_strengths(study: JudgingResults):
    # Nobody can order planted texts by strength: a perfect judge would have a reliability of 0.
    for arm in study.arms:
        assert arm.entry["scores"]["strength_spearman"]["reliability"] is None
        assert arm.entry["scores"]["detection"]["reliability"] is not None

"""Judged latents in a report: scores beside controls and chance, changes over pairs and seeds, splits, and hostile text shown as text."""

import csv
import gzip
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from metasae_lightning import functional, report
from metasae_lightning.cli import main
from metasae_lightning.report import write
from metasae_lightning.report.judged_figure import pair_scores, scatter
from metasae_lightning.report.judged_latents import MAX_ANSWER, MAX_EXPLANATION
from metasae_lightning.report.judged_scores import PAPER_RESULT, group_score, judging_notes
from metasae_lightning.report.judged_section import judged_section
from metasae_lightning.report.latent_browser import browsed_latents, spread_latents
from metasae_lightning.report.load_runs import Arm
from metasae_lightning.report.seeds import Group, difference
from metasae_lightning.report.split_section import bound_phrase, split_section
from tests.helpers.judging_records import CHANCES, add_judging, against, judged_latents, judging_entry, split
from tests.report.test_report import (  # noqa: F401
    HOSTILE,
    PageParser,
    details_by_arm,
    evaluated_run,
    latents_in_page,
    model,
)


def judged_arm(name: str, weight: float | None, seed: int, entry: dict[str, Any], **evaluation: Any) -> Arm:
    record = {"judging": entry} | ({"evaluation": evaluation} if evaluation else {})
    return Arm(name, Path(name), model(weight, seed)["init_args"], record)


def two_arms() -> tuple[Arm, Arm]:
    """A solo and a joint arm of one seed, paired latent by latent."""
    solo = judged_latents(range(8), 0)
    joint = judged_latents(range(8), 1, gain=0.1, pairs={latent: 7 - latent for latent in range(8)})
    entry = judging_entry("weights of joint", joint, against=against("solo", solo, joint))
    arms = judged_arm("solo", None, 0, judging_entry("weights of solo", solo)), judged_arm("joint", 0.3, 0, entry)
    for arm, latents in zip(arms, (solo, joint), strict=True):
        arm.__dict__["judged"] = {"latents": latents}
    return arms


def groups_of(*arms: Arm) -> list[Group]:
    return [Group(arm.name, [arm]) for arm in arms]


def printed(table: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_difference_of_one_seed_is_that_over_pairs_of_latents():
    solo, joint = two_arms()
    pairs = joint.record["judging"]["against"]["scores"]["detection"]["paired"]
    change = difference(*groups_of(joint, solo), "judging/detection")
    assert change is not None and (change.value, change.low, change.high, change.seeds) == (pairs["value"], pairs["low"], pairs["high"], 1)
    assert change.base == solo.figure("judging/detection") == solo.record["judging"]["scores"]["detection"]["mean"]["value"]
    # Compared with another arm, pairs say nothing of this one: the difference of the means has no interval.
    joint.record["judging"]["against"]["arm"] = "another"
    alone = difference(*groups_of(joint, solo), "judging/detection")
    assert alone is not None and math.isnan(alone.low)
    assert alone.value == pytest.approx(joint.figure("judging/detection") - solo.figure("judging/detection"))  # type: ignore[operator]
    # Recorded weights of the first arm decide, whatever its name.
    for weights, known in (("weights of solo", True), ("others", False)):
        joint.record["judging"]["against"]["weights"] = weights
        by_weights = difference(*groups_of(joint, solo), "judging/detection")
        assert by_weights is not None and math.isfinite(by_weights.low) == known


def test_over_several_seeds_the_difference_is_of_means_with_a_paired_t_test():
    def group(name: str, weight: float | None, offset: int, gain: float) -> Group:
        entries = [judging_entry(name, judged_latents(range(8), offset + seed, gain=gain)) for seed in range(3)]
        return Group(name, [judged_arm(f"{name}-seed{seed}", weight, seed, entry) for seed, entry in enumerate(entries)])

    solo, joint = group("solo", None, 0, 0.0), group("joint", 0.3, 10, 0.1)
    values, base_values = joint.values("judging/fuzzing"), solo.values("judging/fuzzing")
    expected = stats.ttest_rel(values, base_values).confidence_interval(0.95)
    score = group_score(joint, solo, "fuzzing")
    assert score is not None and score.change is not None and score.change.seeds == 3 and score.interval is None
    assert (score.change.low, score.change.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert (score.value, score.deviation) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    # A score that beats its controls in one of three seeds says so.
    for arm in joint.arms[1:]:
        arm.record["judging"]["scores"]["fuzzing"]["beats_controls"] = False
    assert "does not beat its controls in 2 of 3 seeds" in judged_section([solo, joint])
    assert "does not beat its controls in 2 of 3 seeds" in " ".join(printed(report.judged_groups([solo, joint])).split())


def test_scores_by_other_judges_or_settings_are_not_compared():
    for key, value, reason in (
        ("judge", {"judge": "causal"}, "not by the same judge"),
        ("explanations", "none", "not with the same explanations"),
        ("settings", {"seed": 1}, "not with the same settings"),
    ):
        solo, joint = two_arms()
        assert group_score(*groups_of(joint, solo), "detection").change is not None  # type: ignore[union-attr]
        joint.record["judging"][key] = value
        assert group_score(*groups_of(joint, solo), "detection").change is None  # type: ignore[union-attr]
        assert any(reason in line for line in judging_notes(groups_of(solo, joint)))


def test_a_result_of_other_weights_is_said_to_be_of_another_sae_and_not_shown(evaluated_run: Path, tmp_path: Path):  # noqa: F811
    run = copied(evaluated_run, tmp_path)
    record = json.loads((run / "evaluation.json").read_text())
    record["arms"]["joint-seed1"]["judging"]["weights"] = "of before"
    (run / "evaluation.json").write_text(json.dumps(record))
    arms = {arm.name: arm for arm in report.study([str(run)]).arms}
    assert arms["joint-seed0"].judged is not None
    assert arms["joint-seed1"].figure("judging/detection") is None and arms["joint-seed0"].figure("judging/detection") is not None
    assert any("another SAE" in phrase for phrase in arms["joint-seed1"].missing) and not arms["joint-seed0"].missing
    path = run / "arms" / "joint-seed0" / "judged.json.gz"
    judged = json.loads(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(json.dumps({**judged, "weights": "of before"}).encode()))
    changed = {arm.name: arm for arm in report.study([str(run)]).arms}
    assert changed["joint-seed0"].judged is None and changed["solo-seed0"].judged is not None


def test_the_page_and_the_terminal_show_each_score_with_chance_controls_and_the_judges_own_score():
    solo, joint = two_arms()
    groups = groups_of(solo, joint)
    cells = [PageParser(f"<p>{cell}").texts for cell in re.findall("<td>(.*?)</td>", judged_section(groups))]
    cells = ["".join(texts) for texts in cells]
    rows = {cells[i].split("made up")[0]: cells[i : i + 5] for i in range(0, len(cells), 5)}
    scores = joint.record["judging"]["scores"]
    pairs = joint.record["judging"]["against"]["scores"]
    terminal = printed(report.judged({arm.name: arm.record["judging"] for arm in (solo, joint)}))
    for name, chance in CHANCES.items():
        _, chance_cell, known, _, cell = rows[name.replace("_", " ")]
        assert chance_cell == f"{chance:.2f}" and known.startswith(f"{chance + 0.21:.2f}") and f"suffix {chance + 0.17:.2f}" in known
        mean, paired = scores[name]["mean"], pairs[name]["paired"]
        assert cell.startswith(f"{mean['value']:.3f}{mean['low']:.3f} to {mean['high']:.3f}")
        change = f"{paired['value']:+.3f} ({paired['low']:+.3f} to {paired['high']:+.3f})"
        assert change in cell.replace("\u2212", "-") and "sign test, p 0.012" in cell
        assert f"other explanation {chance + 0.01:.3f}shuffled contexts {chance + 0.01:.3f}" in cell
        assert ("does not beat its controls" in cell) == (name == "intruder")
        assert f"{mean['value']:.3f} ({mean['low']:.3f} to {mean['high']:.3f})" in terminal and change in terminal
    assert terminal.count("does not beat its controls") == 2
    paper = rows["the paper: fuzzingstrength spearman in its code, on GPT-2 large"]
    assert paper[3:] == ["0.230", "0.248+7.6 %"] and PAPER_RESULT[2] == 7.6
    assert "0.230" in terminal and "+7.6 %" in terminal
    notes = judging_notes(groups)
    assert notes[0].startswith("The judge: embedding all-MiniLM-L6-v2, with keywords") and "6 (too few documents)" in notes[1]
    assert "40 requests or passes" in notes[2] and "2 answers reused" in notes[2]  # both arms were judged together
    assert judged_section(groups_of(judged_arm("bare", None, 0, {}))) == ""


def test_the_embedder_beside_a_judge_has_a_cost_of_its_own():
    solo, joint = two_arms()
    assert not any("embedder" in line for line in judging_notes(groups_of(solo, joint)))
    for arm in (solo, joint):  # judged together, so the cost counts once
        arm.record["judging"]["embedder_cost"] = {"requests": 7, "tokens": 800, "seconds": 3.0, "reused": 0}
    notes = judging_notes(groups_of(solo, joint))
    assert notes[-1] == "Cost of the sentence embedder beside the judge: 7 requests or passes, 800 tokens, 3 seconds."
    assert any(line.startswith("Cost: 40 requests") for line in notes)


def test_unreadable_answers_and_unknown_numbers_are_shown_as_such():
    solo, joint = two_arms()
    entry = joint.record["judging"]["scores"]["detection"]
    entry |= {"unreadable": 0.125, "chance": None, "reliability": None, "beats_controls": None}
    entry["mean"] |= {"low": None, "high": None}
    solo.record["judging"]["scores"].pop("detection")
    (row,) = [row for row in judged_section(groups_of(solo, joint)).split("<tr>") if "<b>detection</b>" in row]
    assert "12.5% of answers unreadable" in row and row.count("<td>&ndash;</td>") == 3  # chance, known meanings, solo
    assert "nan" not in judged_section(groups_of(solo, joint)) and "nan" not in printed(report.judged_groups(groups_of(solo, joint)))


def test_the_figure_has_a_point_for_each_pair_and_the_recorded_difference():
    solo, joint = two_arms()
    figure = scatter([solo, joint])
    assert figure is not None
    points = pair_scores(solo, joint)
    assert list(points) == ["detection", "fuzzing", "intruder", "strength_spearman", "topical_coherence"]
    # Latent i of joint is the pair of latent 7 - i of solo.
    first, second = solo.judged["latents"], joint.judged["latents"]  # type: ignore[index]
    expected = {(first[str(7 - latent)]["scores"]["fuzzing"], second[str(latent)]["scores"]["fuzzing"]) for latent in range(8)}
    offsets = figure.axes[1].collections[0].get_offsets()
    assert {tuple(point) for point in np.asarray(offsets)} == expected == set(points["fuzzing"])
    pairs = joint.record["judging"]["against"]["scores"]["fuzzing"]["paired"]
    assert figure.axes[1].get_title() == f"fuzzing\n{pairs['value']:+.3f} ({pairs['low']:+.3f} to {pairs['high']:+.3f})"
    assert scatter([solo]) is None and scatter([joint, solo]) is None


def test_tables_have_the_scores_of_the_record(judged_page: Path):
    arms = json.loads((judged_page / "run" / "evaluation.json").read_text())["arms"]
    table = json.loads((judged_page / "report" / "table.json").read_text())
    with (judged_page / "report" / "table.csv").open(newline="") as file:
        lines = {line["arm"]: line for line in csv.DictReader(file)}
    for row in table["arms"]:
        for name, entry in arms[row["arm"]]["judging"]["scores"].items():
            assert row[f"judging/{name}"] == entry["mean"]["value"] == float(lines[row["arm"]][f"judging/{name}"])
            assert row[f"judging/{name}/other_explanation"] == entry["controls"]["other_explanation"]["mean"]["value"]
            assert row[f"judging/{name}/beats_controls"] == entry["beats_controls"]
    by_seed = [
        [arms[f"{arm}-seed{seed}"]["judging"]["scores"]["detection"]["mean"]["value"] for seed in (0, 1)] for arm in ("joint", "solo")
    ]
    expected = np.mean(by_seed[0]) - np.mean(by_seed[1])
    assert table["changes"]["joint"]["judging/detection"]["value"] == pytest.approx(expected)


def test_the_page_has_explanations_scores_words_and_pairs_of_judged_latents(judged_page: Path):
    data = latents_in_page((judged_page / "report.html").read_text())
    solo, joint = data["arms"]
    assert joint["judged"] == {"scores": [[name.replace("_", " "), chance] for name, chance in CHANCES.items()], "first": 0}
    assert solo["judged"]["first"] is None
    for arm, details in zip((solo, joint), details_by_arm(data), strict=True):
        path = judged_page / "run" / "arms" / arm["name"] / "judged.json.gz"
        record = json.loads(gzip.decompress(path.read_bytes()))["latents"]
        assert sum(len(row) > 7 for row in arm["rows"]) > 5
        for row, detail in zip(arm["rows"], details, strict=True):
            assert (len(row), len(detail)) == ((10, 10) if str(row[0]) in record else (7, 9))
            if len(row) == 10:
                latent = record[str(row[0])]
                assert row[7] == latent["explanation"][: MAX_EXPLANATION - 1] + (
                    "…" if len(latent["explanation"]) > MAX_EXPLANATION else ""
                )
                assert row[8] == [latent["scores"][name] for name in CHANCES]
                assert row[9] == ([latent["pair"]["latent"], 0.93] if latent["pair"] else [])
                assert [len(answers) for answers in detail[9]] == [1, 0, 0, 0, 0] and len(detail[9][0][0]) <= MAX_ANSWER
    assert (judged_page / "report" / "judged.svg").exists() and (judged_page / "report" / "judged.png").exists()


def test_hostile_explanations_words_and_contexts_are_shown_as_text(judged_page: Path):
    text = (judged_page / "report.html").read_text()
    parser = PageParser(text)
    assert parser.tags.count("script") == 2 and parser.tags.count("img") == 0
    shown = "".join(parser.texts)
    assert "<script>alert" in shown and "hostile <script>" not in text
    splits = text[text.index("<section id=splits>") : text.index("</section>", text.index("<section id=splits>"))]
    assert splits.count('<article class="split">') == 1 + len(HOSTILE)
    assert not set("\x00\x01\x07\x1b\u202e\u200b\ufeff\u2028") & set(splits) and "\ufffd" in splits
    assert len(splits) < 100_000
    # The record's own names as well.
    solo, joint = two_arms()
    entry = joint.record["judging"]
    entry["scores"]["<img src=x>\u202e"] = {**entry["scores"]["detection"], "about": HOSTILE[0]}
    entry["judge"]["model"], entry["left_out"] = HOSTILE[1], {HOSTILE[3]: 2}
    hostile = judged_section(groups_of(solo, joint))
    assert "<img" not in hostile and "<script" not in hostile and not set("\x00\x1b\u202e") & set(hostile)
    entry["scores"]["[red]\x1b[31m"] = entry["scores"].pop("<img src=x>\u202e")
    assert "[red]" in printed(report.judged_groups(groups_of(solo, joint))) and "\x1b" not in printed(
        report.judged_groups(groups_of(solo, joint))
    )


def test_a_split_shows_both_sides_and_what_the_bound_forbids():
    base, arm = Arm("solo", Path("solo")), Arm("joint/a", Path("joint"))
    arm.__dict__["judged"] = {"splits": [split(3, (7, 9)) for _ in range(14)]}
    html = split_section(base, [Arm("none", Path("none")), arm])
    assert html.count('<article class="split">') == 12 and "Shown are 12 of 14." in html
    article = html.split("<article")[1]
    left, right = (
        article.split("</div></div></div><div>", 1) if "</div></div></div><div>" in article else article.split("</div></div><div>", 1)
    )
    assert "whole 3" in left and "part 7" not in left and "part 7" in right and "part 9" in right
    assert 'href="#latent/joint%2Fa/7"' in right and 'href="#latent/solo/3"' in left
    assert left.count("<mark") == 10 and right.count("<mark") == 20  # two firing tokens in each of five texts
    # The strongest token has the deepest colour: 0.12 + 0.6; the other, at half the activation, 0.12 + 0.3.
    assert '/ 0.72)" title="2"> harbour</mark>' in left and '/ 0.42)" title="1"> ships</mark>' in left
    assert "Phi with #3: 0.71 (#7) and 0.80 (#9)." in article and "Measured: 0.21." in article
    bound = functional.cofiring_bound(torch.tensor(0.71), torch.tensor(0.80)).item()
    assert bound == pytest.approx(split(3, (7, 9))["bound"], abs=1e-3)
    assert f"phi of at least {math.floor(100 * bound) / 100}, so they are not disjoint senses" in article
    # 0.149 is not at least 0.15.
    assert "at least 0.14" in bound_phrase(0.149) and "above 0," in bound_phrase(0.004) and "may be disjoint" in bound_phrase(-0.1)
    assert split_section(base, [base]) == ""


def test_judged_latents_stay_in_a_page_that_must_drop_latents(evaluated_run: Path, tmp_path: Path):  # noqa: F811
    arms = report.study([str(copied(evaluated_run, tmp_path))]).browsed
    record = arms[0].judged
    assert record is not None
    record["latents"] = dict(list(record["latents"].items())[:3])
    (browsed, _) = browsed_latents(arms, [None, None], [[], []], 5)
    live = {latent for latent in map(int, record["latents"]) if arms[0].latents["firings"][latent]}  # type: ignore[index]
    assert live and live <= {latent.number for latent in browsed.latents} and len(browsed.latents) == 5
    assert spread_latents(np.array([1, 0, 1, 1, 1]), 2, [1, 3, 4, 0]) == [0, 3]


def test_a_page_over_the_size_limit_keeps_explanations_and_moves_the_judges_words(
    judged_page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(write, "MAX_PAGE_BYTES", (judged_page / "report.html").stat().st_size - 1000)
    assert main(["report", str(judged_page / "run"), "--out", str(tmp_path)]) == 0
    data = latents_in_page((tmp_path / "report.html").read_text())
    assert "details" not in data and any(len(row) > 7 and row[7].startswith("words about harbour") for row in data["arms"][0]["rows"])


def test_a_damaged_file_of_judged_latents_is_one_line(judged_page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    shutil.copytree(judged_page / "run", run)
    path = run / "arms" / "solo-seed0" / "judged.json.gz"
    path.write_bytes(path.read_bytes()[:50])
    assert main(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert f"{path} is damaged: judge again, metasae judge" in line


def copied(run: Path, folder: Path) -> Path:
    """A copy of the run with judged latents."""
    target = folder / "run"
    shutil.copytree(run, target)
    add_judging(target, HOSTILE)
    return target


@pytest.fixture(scope="module")
def judged_page(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with a judged run, `run`, and its report."""
    out = tmp_path_factory.mktemp("judged")
    run = copied(evaluated_run, out)
    assert main(["report", str(run), "--out", str(out)]) == 0
    return out

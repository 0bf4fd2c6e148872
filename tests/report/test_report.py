"""The report: its numbers equal the evaluation record, the page is self-contained, and hostile text is shown as text."""

import base64
import copy
import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats

from metasae_lightning import functional
from metasae_lightning.cli import main
from metasae_lightning.report import latent_browser, latent_data, study, write
from metasae_lightning.report.example_texts import Example, TextPool
from metasae_lightning.report.latent_browser import browsed_latents, matches_of_arms, read_decoder
from metasae_lightning.report.load_runs import Arm, load_arms, training_curves
from metasae_lightning.report.seeds import Group, difference
from metasae_lightning.report.write import page_of_limited_size
from metasae_lightning.sae.pretrained import load_pretrained
from metasae_lightning.training import JointSAE
from tests.evaluation.test_evaluate import QUICK
from tests.helpers.architectures import config
from tests.helpers.judged import HOOK, data_config, sae

HOSTILE = [
    "<script>alert('a')</script> & <img src=x onerror=alert(1)>",
    "</script><script>document.title='b'</script> document with nothing else in it",
    "right to left: \u202e\u05e9\u05dc\u05d5\u05dd\u202c \u0645\u0631\u062d\u0628\u0627 and back",
    "control \x00\x01\x07\x1b[31m characters \u200b\ufeff and \u2028 separators",
    "w" * 4000,
]
PENALTY = {"class_path": "metasae_lightning.penalties.Decomposability", "init_args": {"weight": 0.3, "sigma_sq": 1.0}}


def model(weight: float | None, seed: int) -> dict[str, Any]:
    """The model config of an arm: with a penalty of this weight, or without penalty and meta SAE."""
    penalty = copy.deepcopy(PENALTY)
    penalty["init_args"]["weight"] = weight
    return {
        "init_args": {
            "seed": seed,
            "meta": None if weight is None else {"class_path": "x"},
            "penalties": {} if weight is None else {"d": penalty},
        }
    }


def write_run_with_arms(folder: Path, name: str, arms: dict[str, tuple[float | None, int]], **data: Any) -> Path:
    """Write the folder of a finished run with several arms: config, metrics and exported SAEs."""
    run_folder = folder / name
    run_folder.mkdir(parents=True)
    models = {arm: model(*settings) for arm, settings in arms.items()}
    (run_folder / "config.yaml").write_text(
        yaml.safe_dump({"data": data_config(folder, **data), "model": {"init_args": {"arms": models}}}, sort_keys=False)
    )
    metadata = {
        "model_name": str(folder / "model"),
        "hook_name": HOOK,
        "training_architecture_details": {"k": 8.0},
        "training_tokens": 2048,
    }
    lines = [["step", "epoch", *(f"{arm}/{key}" for arm in arms for key in ("train/tokens", "train/fvu", "val/fvu"))]]
    for step in range(1, 5):
        lines.append([str(step), "0", *(str(x) for _ in arms for x in (64 * step, 0.9 / step, ""))])
    lines.append(["4", "0", *(x for _ in arms for x in ("", "", "0.3"))])
    (run_folder / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    for number, (arm, (weight, _)) in enumerate(arms.items()):
        sae(number, **metadata).save_model(run_folder / "arms" / arm / "saes" / "primary")
        if weight is not None:
            sae(100 + number, 12, threshold=0.3).save_model(run_folder / "arms" / arm / "saes" / "meta")
    return run_folder


FOUR_ARMS = {"solo-seed0": (None, 0), "solo-seed1": (None, 1), "joint-seed0": (0.3, 0), "joint-seed1": (0.3, 1)}


@pytest.fixture(scope="module")
def evaluated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with arms solo and joint, two seeds each, evaluated on text that has hostile documents."""
    folder = tmp_path_factory.mktemp("report")
    data_config(folder)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_text().splitlines()]
    hostile = [f"{text} {i}" for i in range(12) for text in HOSTILE]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, *hostile]))
    run_folder = write_run_with_arms(folder, "run <i>&amp;", FOUR_ARMS)
    assert main(["test", str(run_folder), *(f"--{name}={value}" for name, value in QUICK.items())]) == 0
    # Hostile texts as single tokens, since contexts and the tokenizer cut them.
    latents = run_folder / "arms" / "solo-seed0" / "latents.json.gz"
    latents_record = json.loads(gzip.decompress(latents.read_bytes()))
    first_latent = next(iter(latents_record["contexts"]))
    latents_record["contexts"][first_latent] = [
        {"document": 0, "at": 0, "tokens": [text, " end"], "values": [1.0, 0.5]} for text in HOSTILE
    ]
    maximum, number = latents_record["maximum"][int(first_latent)], len(latents_record["texts"])
    latents_record["examples"][first_latent] = [
        {"text": number + index, "at": 0, "quantile": 1.0, "fired": [[0, maximum], [1, maximum / 2]]} for index in range(len(HOSTILE))
    ]
    latents_record["texts"] += [[text, " end"] for text in HOSTILE]
    latents_record["starts"] += [10**6 + 10 * index for index in range(len(HOSTILE))]
    latents_record["promoted"][first_latent] = HOSTILE
    latents.write_bytes(gzip.compress(json.dumps(latents_record).encode()))
    return run_folder


@pytest.fixture(scope="module")
def page(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert main(["report", str(evaluated_run), "--out", str(out)]) == 0
    return out


class PageParser(HTMLParser):
    """Collects a page's tags, links, visible texts and table cells."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.links, self.texts, self.cells = list[str](), list[str](), list[str](), list[str]()
        self._in: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data", "srcset")]
        self._in.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not self._in or self._in[-1] not in ("script", "style"):
            self.texts.append(data)
        if self._in and self._in[-1] == "td":
            self.cells[-1] += data


def latents_in_page(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="text/plain" id="latents">([A-Za-z0-9+/=]*)</script>', text)
    assert match
    return unpacked(match[1])


def unpacked(text: str) -> dict[str, Any]:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def details_by_arm(data: dict[str, Any]) -> list[list[list[Any]]]:
    """The details of the latents of each arm."""
    details = iter(data["details"])
    return [[next(details) for _ in arm["rows"]] for arm in data["arms"]]


def test_the_tables_have_the_numbers_of_the_evaluation_record(evaluated_run: Path, page: Path):
    record = json.loads((evaluated_run / "evaluation.json").read_text())["arms"]
    table = json.loads((page / "report" / "table.json").read_text())
    with (page / "report" / "table.csv").open(newline="") as file:
        lines = {line["arm"]: line for line in csv.DictReader(file)}
    assert [row["arm"] for row in table["arms"]] == list(FOUR_ARMS) == list(lines)
    for row in table["arms"]:
        figures = record[row["arm"]]["evaluation"]["figures"]
        for kind, figures_of_kind in figures.items():
            for name, value in figures_of_kind.items():
                if isinstance(value, float):
                    assert row[f"{kind}/{name}"] == value and float(lines[row["arm"]][f"{kind}/{name}"]) == value
        assert row["fvu/low"] == record[row["arm"]]["evaluation"]["intervals"]["fvu"][0]
    # The page has the mean over seeds.
    cells = PageParser((page / "report.html").read_text()).cells
    for kind, name, digits in (("phi", "excess", ".3e"), ("reconstruction", "fvu", ".4f"), ("critic", "fve", ".4f")):
        for group in ("solo", "joint"):
            by_seed = [record[f"{group}-seed{seed}"]["evaluation"]["figures"][kind][name] for seed in (0, 1)]
            assert f"{sum(by_seed) / 2:{digits}}".replace("-", "\u2212") in cells


def test_the_interval_of_a_difference_is_a_paired_t_test_over_shared_seeds_or_welchs(evaluated_run: Path):
    groups = study([str(evaluated_run)]).groups
    assert [(group.name, len(group.arms)) for group in groups] == [("solo", 2), ("joint", 2)]
    solo, joint = groups
    result = difference(joint, solo, "phi/excess")
    assert result is not None and result.seeds == 2
    paired = stats.ttest_rel(joint.values("phi/excess"), solo.values("phi/excess")).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((paired.low, paired.high), rel=1e-9)
    assert result.value == pytest.approx((result.low + result.high) / 2)
    # Groups with different seeds have no pairs.
    other = Group("joint", [Arm(arm.name, arm.folder, {**arm.recipe, "seed": arm.seed + 10}, arm.record) for arm in joint.arms])
    unpaired = difference(other, solo, "phi/excess")
    welch = stats.ttest_ind(joint.values("phi/excess"), solo.values("phi/excess"), equal_var=False).confidence_interval(0.95)
    assert unpaired is not None and (unpaired.low, unpaired.high) == pytest.approx((welch.low, welch.high), rel=1e-9)


def test_with_one_seed_the_interval_is_the_evaluations_over_documents(evaluated_run: Path):
    single_seed_study = study([str(evaluated_run / "arms" / "solo-seed0"), str(evaluated_run / "arms" / "joint-seed0")])
    change = difference(single_seed_study.groups[1], single_seed_study.groups[0], "phi/excess", "phi_excess")
    against = single_seed_study.arms[1].entry["against"]["differences"]["phi_excess"]  # type: ignore[index]
    assert change is not None and [change.low, change.high] == against["interval"] and change.value == pytest.approx(against["difference"])
    assert any("says nothing of other seeds" in line for line in single_seed_study.verdict.beside)
    # An interval against another SAE than the baseline is not used.
    single_seed_study.groups[0].arms[0].record["evaluation"]["weights"] = "others"
    other = difference(single_seed_study.groups[1], single_seed_study.groups[0], "phi/excess", "phi_excess")
    assert other is not None and other.low != other.low


def test_the_page_is_self_contained_and_shows_hostile_text_as_text(evaluated_run: Path, page: Path):
    text = (page / "report.html").read_text()
    parser = PageParser(text)
    assert len(text.encode()) < 5_000_000
    assert not [link for link in parser.links if not link.startswith("#")]
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)|@import", text)
    # The page has two scripts, both ours: the latents as text, and the code.
    assert parser.tags.count("script") == 2 and parser.tags.count("img") == 0 and parser.tags.count("i") == 0
    assert parser.tags.count("svg") >= 5
    assert any("run <i>&amp;" in part for part in parser.texts)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e\u200b\ufeff]", text)
    shown = "".join(token for tokens in latents_in_page(text)["texts"] for token in tokens)
    assert all(text in shown for text in HOSTILE)


def test_latents_have_their_nearest_rows_matches_and_meta_latents(evaluated_run: Path, page: Path):
    data = latents_in_page((page / "report.html").read_text())
    solo, joint = data["arms"]
    solo_details, joint_details = details_by_arm(data)
    assert (solo["name"], joint["name"], solo["other"], joint["other"]) == ("solo-seed0", "joint-seed0", 1, 0)
    rows = {name: functional.unit_rows(sae(seed).W_dec.detach()) for seed, name in ((0, "solo"), (2, "joint"))}
    meta = sae(102, 12, threshold=0.3)
    for row, (near, match, meta_latents, partners, bars, promoted, suppressed, examples, matched_by) in zip(
        joint["rows"], joint_details, strict=True
    ):
        number, firings, largest, cosine, match_cosine, phi, token = row
        assert (cosine, match_cosine, phi) == (near[0][1], match[1], partners[0][1] if partners else None)
        cosines = rows["joint"][number] @ rows["joint"].T
        cosines[number] = -1
        assert near[0] == [int(cosines.argmax()), pytest.approx(cosines.max().item(), abs=1e-3)]
        across = rows["solo"] @ rows["joint"][number]
        of_other = [[latent, row.max().item()] for latent, row in enumerate(rows["solo"] @ rows["joint"].T) if int(row.argmax()) == number]
        alike = sorted((pair for pair in of_other if pair[1] >= latent_browser.ALIKE), key=lambda pair: -pair[1])
        assert matched_by == [[latent, pytest.approx(cosine, abs=1e-3)] for latent, cosine in alike]
        assert match == [int(across.argmax()), pytest.approx(across.max().item(), abs=1e-3)]
        parts = meta.encode(rows["joint"][number][None])[0].detach()
        assert [latent for latent, _ in meta_latents] == parts.topk(4).indices[parts.topk(4).values > 0].tolist()
        assert firings > 0 and largest > 0 and 1 <= len(examples) <= 10 and len(bars) == 16 and "z" in bars
        text, at, quantile, fired = examples[0]
        assert data["texts"][text][at] == token and quantile == 1.0 and fired[fired.index(0) + 1] == 100
        assert len(promoted) == len(suppressed) == 10
    shares = meta.encode(rows["joint"]).detach()
    largest = int(shares.amax(0).argmax())
    assert joint["metas"][largest][0] == [int(shares[:, largest].argmax()), pytest.approx(shares[:, largest].max().item(), abs=1e-3)]
    assert solo["metas"] == [] and all(detail[2] == [] for detail in solo_details)


def test_a_page_over_the_size_limit_keeps_the_details_of_latents_in_files_beside_it(
    evaluated_run: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = (page / "report.html").read_text()
    monkeypatch.setattr(write, "MAX_PAGE_BYTES", len(text.encode()) - 1000)
    monkeypatch.setattr(latent_data, "LATENTS_IN_FILE", 7)
    assert main(["report", str(evaluated_run), "--out", str(tmp_path)]) == 0
    smaller = (tmp_path / "report.html").read_text()
    whole, index = latents_in_page(text), latents_in_page(smaller)
    assert len(smaller.encode()) <= write.MAX_PAGE_BYTES and index == {"arms": whole["arms"], "in_file": 7}
    assert "'self'" in smaller and "'self'" not in text
    for number, details in enumerate(details_by_arm(whole)):
        files = [tmp_path / "report" / "latents" / f"{number}-{file}.js" for file in range(-(-len(details) // 7))]
        parts = [re.fullmatch(r'latentDetails\("([0-9-]+)","(.*)"\);\n', path.read_text()) for path in files]
        assert [part and part[1] for part in parts] == [path.stem for path in files]
        in_files = [row for part in parts if part for row in unpacked(part[2])["details"]]
        assert [row[:5] for row in in_files] == [row[:5] for row in details]
        texts = [unpacked(part[2])["texts"] for part in parts if part]
        for position, row in enumerate(in_files):
            of_file = [(texts[position // 7][text][at], quantile, fired) for text, at, quantile, fired in row[7]]
            assert of_file == [(whole["texts"][text][at], quantile, fired) for text, at, quantile, fired in details[position][7]]


def test_a_list_over_the_size_limit_shows_fewer_latents_from_rare_to_common(evaluated_run: Path, monkeypatch: pytest.MonkeyPatch):
    full_study = study([str(evaluated_run)])
    decoders = [read_decoder(arm) for arm in full_study.browsed]
    matches = matches_of_arms(decoders)
    all_latents, five_latents = (browsed_latents(full_study.browsed, decoders, matches, limit) for limit in (1000, 5))
    monkeypatch.setattr(latent_browser, "ROWS", 7)
    assert browsed_latents(full_study.browsed, decoders, matches_of_arms(decoders), 1000) == all_latents
    firings = sorted(latent.firings for latent in all_latents[0].latents)
    assert len(five_latents[0].latents) == 5 and five_latents[0].entry["live"] == len(all_latents[0].latents)
    assert {firings[0], firings[-1]} <= {latent.firings for latent in five_latents[0].latents}
    no_figures = Future[dict[str, str]]()
    no_figures.set_result({})
    monkeypatch.setattr(write, "MAX_PAGE_BYTES", 1)
    text, arms_in_files = page_of_limited_size(full_study, no_figures)
    assert [len(arm["rows"]) for arm in latents_in_page(text)["arms"]] == [1, 1] == [len(arm.latents) for arm in arms_in_files]


def test_a_run_folder_from_before_examples_gives_a_page_of_its_top_contexts(evaluated_run: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    for path in run.glob("arms/*/latents.json.gz"):
        record = json.loads(gzip.decompress(path.read_bytes()))
        old = {key: record[key] for key in ("weights", "tokens", "firings", "maximum", "contexts")}
        path.write_bytes(gzip.compress(json.dumps(old).encode()))
    assert main(["report", str(run)]) == 0
    data = latents_in_page((run / "report.html").read_text())
    for near, _, _, partners, bars, promoted, suppressed, examples, _ in data["details"]:
        assert near and (partners, bars, promoted, suppressed) == ([], "", [], []) and 1 <= len(examples) <= len(HOSTILE)
        assert all(quantile is None and at < len(data["texts"][text]) for text, at, quantile, _ in examples)


def test_an_sae_from_elsewhere_has_the_same_page_without_neighbours_if_its_folder_is_gone(tmp_path: Path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "results"
    recipe.write_text(yaml.safe_dump({"data": data_config(tmp_path)}))
    sae(0, hook_name=HOOK).save_model(tmp_path / "foreign")
    options = [f"--{name}={value}" for name, value in {**QUICK, "critic_seeds": 0, "splice_tokens": 0}.items()]
    assert main(["test", "--sae", str(tmp_path / "foreign"), "--data", str(recipe), "--out", str(out), *options]) == 0
    for is_there in (True, False):
        assert main(["report", str(out)]) == 0
        data = latents_in_page((out / "report.html").read_text())
        assert len(data["details"]) == len(data["arms"][0]["rows"]) > 10
        for near, match, metas, _, bars, promoted, _, examples, _ in data["details"]:
            assert bool(near) == is_there and match == metas == [] and len(bars) == 16 and len(promoted) == 10 and examples
        if is_there:
            (tmp_path / "foreign").rename(tmp_path / "moved")


def test_texts_that_overlap_are_stored_once_and_others_stay_apart():
    def example(tokens: str, start: int | None, at: int = 0) -> Example:
        return Example(list(tokens), start, at, 1.0, [])

    examples = [example("cdef", 2, 1), example("abcd", 0), example("gh", 6), example("xy", None), example("XX", 1, 1)]
    pool = TextPool(examples[:4])
    assert ["".join(text) for text in pool.texts] == ["abcdef", "gh"]  # adjacent texts may be of two documents
    assert [pool.place(each) for each in examples] == [(0, 3), (0, 0), (1, 0), (2, 0), (3, 1)]  # the last is of another text
    assert "".join(pool.texts[2]) == "xy" and pool.place(examples[3]) == (2, 0)


def test_missing_results_are_named_and_the_others_are_plotted(evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    record = json.loads((run / "evaluation.json").read_text())
    del record["arms"]["solo-seed1"]
    record["arms"]["joint-seed1"] = {"validation": {"stopped": "loss is nan at step 7"}}
    (run / "evaluation.json").write_text(json.dumps(record))
    (run / "arms" / "solo-seed0" / "latents.json.gz").unlink()
    shutil.rmtree(run / "arms" / "joint-seed1")
    (run / "metrics.csv").unlink()
    assert main(["report", str(run)]) == 0
    out, text = capsys.readouterr().out, "".join(PageParser((run / "report.html").read_text()).texts)
    missing_by_arm = {
        "joint-seed1": ("it stopped: loss is nan", "no SAE"),
        "solo-seed1": ("no evaluation",),
        "solo-seed0": ("nothing of single",),
    }
    for name, parts in missing_by_arm.items():
        for words in (f"{name}: {part}" for part in parts):
            assert words in out and words in text
    assert "no metrics.csv" in text
    assert {path.stem for path in (run / "report").glob("*.svg")} == {"gain", "tradeoff", "phi", "decoder", "critic", "latents"}
    assert [arm["name"] for arm in latents_in_page((run / "report.html").read_text())["arms"]] == ["joint-seed0"]
    # A run that has only its config and a training curve.
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "config.yaml", bare)
    shutil.copy(evaluated_run / "metrics.csv", bare)
    assert main(["report", str(bare)]) == 0
    assert "no co-firing measured" in (bare / "report.html").read_text()


def test_curves_of_a_resumed_run_are_joined(tmp_path: Path):
    head = "step,epoch,train/tokens,train/fvu,val/fvu\n"
    (tmp_path / "metrics.1.csv").write_text(head + "1,0,10,0.9,\n2,0,20,0.8,\n2,0,,,0.85\n3,0,30,0.71,\n")
    (tmp_path / "metrics.csv").write_text(head + "3,0,30,0.7,\n4,0,40,0.6,\n4,0,,,0.65\n5,0,50,0.")
    curves = training_curves(tmp_path)
    assert curves["train/fvu"] == [(10, 0.9), (20, 0.8), (30, 0.7), (40, 0.6), (50, 0.0)]
    assert curves["val/fvu"] == [(20, 0.85), (40, 0.65)]


def test_a_second_report_of_the_same_run_is_byte_equal(evaluated_run: Path, page: Path, tmp_path: Path):
    assert main(["report", str(evaluated_run), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_bytes() == (page / "report.html").read_bytes()
    for path in (page / "report").glob("*.[cjs]*"):
        assert (tmp_path / "report" / path.name).read_bytes() == path.read_bytes()


def test_figures_are_also_written_as_png_and_svg_files(page: Path):
    names, svg_names = {path.stem for path in (page / "report").glob("*.png")}, {path.stem for path in (page / "report").glob("*.svg")}
    assert names == svg_names == {"tradeoff", "phi", "decoder", "critic", "latents", "training"}
    assert all((page / "report" / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in names)
    assert "currentColor" not in (page / "report" / "phi.svg").read_text()


def test_the_command_prints_the_table_and_the_verdict(
    evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["report", str(evaluated_run), "--out", str(tmp_path), "--title", "[red]Two seeds"]) == 0
    out = capsys.readouterr().out
    assert "[red]Two seeds" in out and "2 seeds" in out and "excess |phi|" in out
    assert study([str(evaluated_run)]).verdict.sentence in " ".join(out.split())
    assert "[red]Two seeds" in (tmp_path / "report.html").read_text()


def test_errors_are_one_line_and_leave_the_older_page_unchanged(evaluated_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = tmp_path / "run"
    shutil.copytree(evaluated_run, run)
    (run / "report.html").write_text("the page before")

    def error_line_of(*args: str) -> str:
        assert main(["report", *args]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "there is no such run" in error_line_of(str(tmp_path / "nowhere"))
    assert "is no run" in error_line_of(str(tmp_path))
    latents = run / "arms" / "solo-seed0" / "latents.json.gz"
    latents.write_bytes(latents.read_bytes()[:100])
    assert f"{latents} is damaged" in error_line_of(str(run))
    (run / "evaluation.json").write_text("{")
    assert "evaluation.json cannot be read" in error_line_of(str(run))
    assert (run / "report.html").read_text() == "the page before" and not list(run.glob(".report*"))
    (tmp_path / "mine" / "report").mkdir(parents=True)
    assert "no report of ours" in error_line_of(str(evaluated_run), "--out", str(tmp_path / "mine"))
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", Path("/proc/out")):  # not even root can make a folder there
        assert main(["report", str(evaluated_run), "--out", str(out)]) == 2
        printed = capsys.readouterr()  # nothing before the error
        assert (printed.out, printed.err.count("\n")) == ("", 1) and f"metasae: error: --out {out}: " in printed.err
    (tmp_path / "bare").mkdir()
    shutil.copy(evaluated_run / "config.yaml", tmp_path / "bare")
    assert "there is no result to report" in error_line_of(str(tmp_path / "bare"))
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["config.yaml"]


def test_a_report_of_finished_runs_imports_neither_torch_nor_sae_lens(evaluated_run: Path, tmp_path: Path):
    arguments = ["report", str(evaluated_run), "--out", str(tmp_path)]
    heavy = ("torch", "lightning", "sae_lens", "transformers", "scipy.stats", "matplotlib.pyplot")
    code = (
        "import json, sys; from metasae_lightning.cli import main; "
        f"status = main({arguments!r}); print(); print(json.dumps([status, [name for name in {heavy!r} if name in sys.modules]]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(process.stdout.splitlines()[-1]) == [0, []]


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("normalizer", ["none", "layer_norm"])
def test_decoder_rows_and_codes_read_without_torch_equal_those_of_saelens(architecture: str, normalizer: str, tmp_path: Path):
    training_sae = JointSAE(config(architecture, normalize_activations=normalizer), None).primary.sae
    with torch.no_grad():
        training_sae.W_dec.mul_(torch.rand(len(training_sae.W_dec), 1) + 0.5)  # rows of unequal length: exports fold them
    training_sae.save_inference_model(tmp_path / "sae")
    loaded = load_pretrained(tmp_path / "sae")
    x = torch.randn(64, training_sae.cfg.d_in)
    assert latent_browser.decoder_rows(tmp_path / "sae") == pytest.approx(loaded.W_dec.detach().numpy(), abs=1e-6)
    with torch.no_grad():
        codes = loaded.encode(x).numpy()
    assert latent_browser.encode(tmp_path / "sae", x.numpy()) == pytest.approx(codes, abs=1e-5)


def test_arms_of_several_runs_have_distinct_names(evaluated_run: Path, tmp_path: Path):
    other = tmp_path / "again"
    shutil.copytree(evaluated_run, other)
    names = [arm.name for arm in load_arms([str(evaluated_run), str(other)])]
    assert len(set(names)) == 8 and names[0] == f"{evaluated_run}/solo-seed0"
    assert torch.equal(torch.tensor([arm.seed for arm in load_arms([str(evaluated_run)])]), torch.tensor([0, 1, 0, 1]))

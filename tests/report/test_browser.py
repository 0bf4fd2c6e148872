"""The report page in a browser: no errors, no network requests, and working search, sorting, keys, links and judged latents.

Needs Chromium and the package `playwright`, which the project does not install; run with `-m slow`.
Environment: CHROMIUM, the program if it is not on the path; REPORT, another page to test; SCREENSHOTS, a folder for screenshots.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metasae_lightning.cli import main
from metasae_lightning.report import latent_data, write
from tests.report.test_judged import judged_page  # noqa: F401
from tests.report.test_report import HOSTILE, evaluated_run  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def problems() -> list[str]:
    return []


@pytest.fixture
def page_in_browser(
    browser: Any,
    problems: list[str],
    evaluated_run: Path,  # noqa: F811
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Iterator[Any]:
    html = Path(os.environ.get("REPORT", tmp_path / "report.html"))  # a page of a finished run
    if "REPORT" not in os.environ:
        assert main(["report", str(evaluated_run), "--out", str(tmp_path)]) == 0
    width, scheme = getattr(request, "param", (1440, "light"))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(f"a dialog: {dialog.message}"))
    page.on(
        "request",
        lambda request_sent: None if request_sent.url.startswith("file:") else problems.append(f"a request for {request_sent.url}"),
    )
    page.goto(html.as_uri())
    page.wait_for_selector("#latent h3")
    yield page
    page.close()


SIZES = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]


@pytest.mark.parametrize("page_in_browser", SIZES, indirect=True, ids=[f"{width}-{scheme}" for width, scheme in SIZES])
def test_the_page_opens_without_errors_and_fits_the_window(page_in_browser: Any, problems: list[str], request: pytest.FixtureRequest):
    assert not problems
    assert page_in_browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    letters = page_in_browser.evaluate(
        """() => [...document.querySelectorAll('figure svg text')].filter((t) => t.textContent.trim())
             .map((t) => t.getBoundingClientRect().height)"""
    )
    assert letters and min(letters) > 7
    if folder := os.environ.get("SCREENSHOTS"):
        page_in_browser.screenshot(path=f"{folder}/{request.node.callspec.id}.png", full_page=True)


def numbers(page: Any) -> list[int]:
    return [int(text.lstrip("#")) for text in page.locator(".row b").all_inner_texts()]


def scores(page: Any) -> list[float]:
    """The score that each latent of the list is sorted by, where it has one."""
    return [float(words[0]) for text in page.locator(".row small").all_inner_texts() if (words := text.split())[0][0].isdigit()]


def shown(page: Any, *, linked: bool = True) -> int:
    """The number of the latent whose card is shown; it is selected and, if it was gone to and not only found, in the address."""
    number = int(page.inner_text("#latent h3").split()[0].lstrip("#"))
    assert not linked or page.url.endswith(f"/{number}")
    assert page.inner_text(".row[aria-selected] b") == f"#{number}"
    return number


def test_search_sorting_arms_and_links_between_latents_work(page_in_browser: Any, problems: list[str]):
    in_page_order = numbers(page_in_browser)
    page_in_browser.fill("#search", "zzz in no text")
    assert numbers(page_in_browser) == [] and page_in_browser.inner_text("#count").startswith("0 latents")
    page_in_browser.fill("#search", f"#{in_page_order[3]}")
    assert numbers(page_in_browser)[0] == in_page_order[3] == shown(page_in_browser, linked=False)
    token = page_in_browser.inner_text("#latent .context .middle >> nth=0").strip()
    page_in_browser.fill("#search", token)
    assert in_page_order[3] in numbers(page_in_browser) and "fire on it" in page_in_browser.inner_text("#count")
    page_in_browser.fill("#search", "")
    page_in_browser.select_option("#sort", "number")
    assert numbers(page_in_browser) == sorted(in_page_order) != in_page_order
    page_in_browser.click("#direction")
    assert numbers(page_in_browser) == sorted(in_page_order, reverse=True)
    page_in_browser.click("#direction")
    for score in ("strong", "near", "match", "partner", "density"):
        page_in_browser.select_option("#sort", score)
        values = scores(page_in_browser)
        assert values == sorted(values, reverse=True)
    link = page_in_browser.locator("#latent .chips button:not([disabled])").first
    target = int(link.evaluate("button => button.firstChild.textContent").lstrip("#"))
    link.click()
    assert shown(page_in_browser) == target
    page_in_browser.select_option("#arm", "1")
    page_in_browser.evaluate("document.activeElement.blur()")
    for _ in numbers(page_in_browser):  # up to a latent that meta-latents compose
        if page_in_browser.locator(".composition").count():
            break
        page_in_browser.keyboard.press("j")
        page_in_browser.wait_for_timeout(50)
    page_in_browser.wait_for_selector(".composition path", state="attached")
    metas = page_in_browser.locator(".composition .meta")
    assert metas.count() == page_in_browser.locator(".composition path").count() > 0
    picture, last = page_in_browser.locator(".composition").bounding_box(), metas.last.bounding_box()
    assert picture["y"] + picture["height"] - last["y"] - last["height"] < 20  # no empty rows below
    page_in_browser.click("#latent .context summary >> nth=0")
    whole, line = (page_in_browser.inner_text(f"#latent .context {part} >> nth=0") for part in ("p", "summary .middle"))
    assert line.strip() in whole
    assert not problems


def test_keys_move_through_the_list_and_a_link_leads_to_its_latent(page_in_browser: Any, problems: list[str]):
    order = numbers(page_in_browser)
    for keys, expected in (("jj", 2), ("k", 1), ("kkk", 0)):
        for pressed in keys:
            page_in_browser.keyboard.press(pressed)
        assert shown(page_in_browser) == order[expected]
    page_in_browser.keyboard.press("/")
    page_in_browser.keyboard.type("zzz jk")
    assert page_in_browser.input_value("#search") == "zzz jk"
    page_in_browser.fill("#search", "")
    page_in_browser.keyboard.press("Escape")
    page_in_browser.keyboard.press("ArrowDown")
    assert shown(page_in_browser) == order[1]
    address = page_in_browser.url
    page_in_browser.keyboard.press("m")
    assert "/joint-seed0/" in page_in_browser.url
    page_in_browser.goto("about:blank")
    page_in_browser.goto(address)
    page_in_browser.wait_for_selector("#latent h3")
    assert shown(page_in_browser) == order[1]
    page_in_browser.keyboard.press("r")
    assert scores(page_in_browser) == sorted(scores(page_in_browser)) and numbers(page_in_browser) != order
    assert not problems


def test_details_in_files_beside_the_page_are_loaded_from_disk(
    browser: Any,
    problems: list[str],
    evaluated_run: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    assert main(["report", str(evaluated_run), "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(write, "MAX_PAGE_BYTES", (tmp_path / "report.html").stat().st_size - 1000)
    monkeypatch.setattr(latent_data, "LATENTS_IN_FILE", 7)
    assert main(["report", str(evaluated_run), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "report" / "latents" / "1-0.js").exists()
    page = browser.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector("#latent .context")
    for _ in range(9):
        before = page.inner_text("#latent h3")
        page.keyboard.press("j")
        page.wait_for_function("before => document.querySelector('#latent h3').innerText !== before", arg=before)
        assert shown(page) and page.locator("#latent .context").count() > 0
    assert not problems
    page.close()


def test_hostile_text_is_shown_as_text(page_in_browser: Any, problems: list[str]):
    if "REPORT" in os.environ:
        pytest.skip("another page's text")
    page_in_browser.fill("#search", "<script>")
    assert page_in_browser.locator(".context", has_text="<script>alert").count() > 0
    assert page_in_browser.locator(".chips", has_text="<script>alert").count() > 0
    assert page_in_browser.locator(".row", has_text="<script>alert").count() > 0
    page_in_browser.fill("#search", "right to left")
    text = page_in_browser.inner_text("#latent")
    assert "U+202E" in text and "\u202e" not in text
    assert page_in_browser.title() == "run <i>&amp;" and page_in_browser.locator(".explorer script, .explorer img").count() == 0
    assert not problems


@pytest.fixture
def judged_page_in_browser(
    browser: Any,
    problems: list[str],
    judged_page: Path,  # noqa: F811
    request: pytest.FixtureRequest,
) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": getattr(request, "param", 1440), "height": 900})
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(f"a dialog: {dialog.message}"))
    page.goto((judged_page / "report.html").as_uri())
    page.wait_for_selector("#latent h3")
    yield page
    page.close()


def test_explanations_are_found_and_judged_scores_sort_the_list(judged_page_in_browser: Any, problems: list[str]):
    page = judged_page_in_browser
    page.fill("#search", "about HARBOUR 12 and")
    assert numbers(page) == [12] and "1 have it in their explanations" in page.inner_text("#count")
    page.fill("#search", "")
    assert page.locator("#sort option").all_inner_texts()[-5:] == [
        *("detection", "fuzzing", "intruder", "strength spearman", "topical coherence")
    ]
    for name in ("detection", "topical coherence"):
        page.select_option("#sort", label=name)
        values = scores(page)
        assert len(values) > 5 and values == sorted(values, reverse=True)
        texts = page.locator(".row small").all_inner_texts()
        assert texts[len(values) :] and set(texts[len(values) :]) == {"\u2013"}  # latents that were not judged come last
    page.click("#direction")
    assert scores(page) == values[::-1]
    assert not problems


def test_a_judged_latents_card_has_explanation_scores_words_and_its_pair(judged_page_in_browser: Any, problems: list[str]):
    page = judged_page_in_browser
    page.select_option("#arm", "1")
    page.fill("#search", "#12")
    page.wait_for_selector("#latent .judgement")
    assert page.inner_text("#latent .explanation") == "words about harbour 12 and ships"
    assert page.locator("#latent .scores > span").count() == 5 and "chance 0.20" in page.inner_text("#latent .scores")
    words = page.locator("#latent .words p")
    assert not words.first.is_visible()
    page.click("#latent .words summary")
    assert words.first.is_visible() and words.all_inner_texts() == ["Yes, it is about harbour 12."]
    # The pair leads to the other arm, and back from there.
    for name in ("/solo-seed0/12", "/joint-seed0/12"):
        page.click("#latent .judgement .chips button")
        page.wait_for_function("name => location.hash.endsWith(name)", arg=name)
        page.wait_for_selector("#latent .judgement .chips button")
    page.fill("#search", "#40")
    page.wait_for_function("document.querySelector('#latent h3').innerText.startsWith('#40')")
    assert page.locator("#latent .judgement").count() == 0  # not judged
    assert not problems


@pytest.mark.parametrize("judged_page_in_browser", [390, 1440], indirect=True)
def test_splits_stand_side_by_side_where_there_is_room(judged_page_in_browser: Any, problems: list[str], request: pytest.FixtureRequest):
    page = judged_page_in_browser
    whole, parts = (page.locator("#splits .sides > div").nth(index).bounding_box() for index in (0, 1))
    if page.viewport_size["width"] == 390:
        assert parts["y"] >= whole["y"] + whole["height"] and parts["x"] == whole["x"]
    else:
        assert parts["y"] == whole["y"] and parts["x"] >= whole["x"] + whole["width"]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    letters = page.evaluate("[...document.querySelectorAll('#concepts svg text')].map((text) => text.getBoundingClientRect().height)")
    assert letters and min(letters) > 7
    page.click("#splits .side a >> nth=0")
    page.wait_for_function("document.querySelector('#latent h3')?.innerText.startsWith('#3')")
    assert not problems
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/judged-{request.node.callspec.id}.png", full_page=True)


def test_hostile_explanations_and_words_are_shown_as_text(judged_page_in_browser: Any, problems: list[str]):
    page = judged_page_in_browser
    page.select_option("#arm", "1")
    page.fill("#search", "hostile")
    found = numbers(page)
    assert found and set(found) <= set(range(len(HOSTILE)))
    for number in found:
        page.fill("#search", f"#{number}")
        page.wait_for_function("number => document.querySelector('#latent h3').innerText.startsWith('#' + number)", arg=str(number))
        page.click("#latent .words summary")
        for text in (page.inner_text("#latent .explanation"), page.inner_text("#latent .words p")):
            assert not set("\x00\x01\x07\x1b\u202e\u200b\ufeff\u2028") & set(text) and HOSTILE[number][:6] in text
    assert page.locator(".explorer script, .explorer img, #splits script, #splits img").count() == 0
    assert page.title() == "run" and not problems

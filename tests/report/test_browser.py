"""The report page in a browser: no errors, no network requests, and working search, sorting and links between latents.

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
from tests.report.test_report import evaluated_run  # noqa: F401

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
    page.wait_for_selector(".latent")
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


def test_search_sorting_arms_and_links_between_latents_work(page_in_browser: Any, problems: list[str]):
    def numbers() -> list[int]:
        return [int(text.split()[0].lstrip("#")) for text in page_in_browser.locator(".latent h3").all_inner_texts()]

    in_page_order = numbers()
    page_in_browser.fill("#search", "zzz in no text")
    assert numbers() == [] and page_in_browser.inner_text("#count").startswith("0 latents")
    page_in_browser.fill("#search", f"#{in_page_order[3]}")
    assert numbers()[0] == in_page_order[3]
    page_in_browser.fill("#search", "")
    page_in_browser.select_option("#sort", "number")
    assert numbers() == sorted(numbers()) and numbers() != in_page_order
    page_in_browser.select_option("#sort", "density")
    assert numbers() == in_page_order
    link = page_in_browser.locator(".near button:not([disabled])").first
    target = link.inner_text()
    link.click()
    assert page_in_browser.input_value("#search") == target and f"#{numbers()[0]}" == target
    page_in_browser.fill("#search", "")
    page_in_browser.select_option("#arm", "1")
    assert page_in_browser.locator(".latent").count() == 25 and "meta latent" in page_in_browser.inner_text("#list")
    page_in_browser.click("#more")
    assert page_in_browser.locator(".latent").count() > 25
    assert not problems


def test_hostile_text_is_shown_as_text(page_in_browser: Any, problems: list[str]):
    if "REPORT" in os.environ:
        pytest.skip("another page's text")
    page_in_browser.fill("#search", "<script>")
    assert page_in_browser.locator(".context", has_text="<script>alert").count() > 0
    page_in_browser.fill("#search", "right to left")
    text = page_in_browser.inner_text("#list")
    assert "U+202E" in text and "\u202e" not in text
    assert page_in_browser.title() == "run <i>&amp;" and page_in_browser.locator("#list script, #list img").count() == 0
    assert not problems

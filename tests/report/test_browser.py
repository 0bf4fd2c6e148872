"""The page in a browser: nothing goes wrong, nothing is asked for, and search, order and links between latents do what they say.

Needs Chromium and the package `playwright`, which are no part of the project; `python -m pytest -m slow tests/test_browser.py`. CHROMIUM is
the program where it is not on the path, REPORT another page to look at, SCREENSHOTS a folder for pictures.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metasae_lightning.cli import main
from tests.report.test_report import measured  # noqa: F401

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def complaints() -> list[str]:
    return []


@pytest.fixture
def shown(browser: Any, complaints: list[str], measured: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:  # noqa: F811
    place = Path(os.environ.get("REPORT", tmp_path / "report.html"))  # a page of a finished run
    if "REPORT" not in os.environ:
        assert main(["report", str(measured), "--out", str(tmp_path)]) == 0
    width, scheme = getattr(request, "param", (1440, "light"))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(f"a dialog: {dialog.message}"))
    page.on("request", lambda asked: None if asked.url.startswith("file:") else complaints.append(f"asked for {asked.url}"))
    page.goto(place.as_uri())
    page.wait_for_selector(".latent")
    yield page
    page.close()


SIZES = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]


@pytest.mark.parametrize("shown", SIZES, indirect=True, ids=[f"{width}-{scheme}" for width, scheme in SIZES])
def test_the_page_opens_without_a_word_and_fits(shown: Any, complaints: list[str], request: pytest.FixtureRequest):
    assert not complaints
    assert shown.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    letters = shown.evaluate(
        """() => [...document.querySelectorAll('figure svg text')].filter((t) => t.textContent.trim())
             .map((t) => t.getBoundingClientRect().height)"""
    )
    assert letters and min(letters) > 7
    if folder := os.environ.get("SCREENSHOTS"):
        shown.screenshot(path=f"{folder}/{request.node.callspec.id}.png", full_page=True)


def test_search_order_and_links_work(shown: Any, complaints: list[str]):
    def numbers() -> list[int]:
        return [int(text.split()[0].lstrip("#")) for text in shown.locator(".latent h3").all_inner_texts()]

    everything = numbers()
    shown.fill("#search", "zzz that no text holds")
    assert numbers() == [] and shown.inner_text("#count").startswith("0 latents")
    shown.fill("#search", f"#{everything[3]}")
    assert numbers()[0] == everything[3]
    shown.fill("#search", "")
    shown.select_option("#sort", "number")
    assert numbers() == sorted(numbers()) and numbers() != everything
    shown.select_option("#sort", "density")
    assert numbers() == everything
    link = shown.locator(".near button:not([disabled])").first
    wanted = link.inner_text()
    link.click()
    assert shown.input_value("#search") == wanted and f"#{numbers()[0]}" == wanted
    shown.fill("#search", "")
    shown.select_option("#arm", "1")
    assert shown.locator(".latent").count() == 25 and "meta latent" in shown.inner_text("#list")
    shown.click("#more")
    assert shown.locator(".latent").count() > 25
    assert not complaints


def test_hostile_text_is_text(shown: Any, complaints: list[str]):
    if "REPORT" in os.environ:
        pytest.skip("another page's text")
    shown.fill("#search", "<script>")
    assert shown.locator(".context", has_text="<script>alert").count() > 0
    shown.fill("#search", "right to left")
    text = shown.inner_text("#list")
    assert "U+202E" in text and "\u202e" not in text
    assert shown.title() == "run <i>&amp;" and shown.locator("#list script, #list img").count() == 0
    assert not complaints

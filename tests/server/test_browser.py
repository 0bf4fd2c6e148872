"""The page of `metasae serve` in a browser: no errors, no requests to elsewhere, and a text read and continued with the keyboard.

Needs Chromium and the package `playwright`, which the project does not install; run with `-m slow`.
Environment: CHROMIUM, the program if it is not on the path; SERVED, the address of a server to test; SCREENSHOTS, a folder for screenshots.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jsonargparse import Namespace

from metasae_lightning.cli.serve import listening_socket, served_saes
from tests.helpers.judged import write_run

playwright = pytest.importorskip("playwright.sync_api")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")]

# Were it taken for HTML, the page would ask for an image.
HOSTILE = "<img src=x>"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if "SERVED" in os.environ:
        yield os.environ["SERVED"]
        return
    from metasae_lightning.server.application import application

    folder = tmp_path_factory.mktemp("served")
    places = [str(write_run(folder, name, seed=seed)) for seed, name in enumerate(("solo", "<b>joint"))]
    app = application(served_saes(Namespace(places=places, data=None, device=None)), "127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with listening_socket("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


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
def page(browser: Any, problems: list[str], address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    own = {f"{address}{path}" for path in ("", "page.js", "page.css", "description", "firings", "continuations")}
    width, scheme = getattr(request, "param", (1440, "light"))
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda sent: problems.append(f"a request for {sent.url}") if sent.url not in own | {"data:,"} else None)
    page.goto(address)
    page.wait_for_selector("#steering:not([hidden])")
    yield page
    page.close()


SIZES = [(390, "light"), (390, "dark"), (1440, "light"), (1440, "dark")]


def press(page: Any, selector: str, key: str = "Enter") -> None:
    page.locator(selector).first.focus()
    page.keyboard.press(key)


@pytest.mark.parametrize("page", SIZES, indirect=True, ids=[f"{width}-{scheme}" for width, scheme in SIZES])
def test_a_text_is_read_and_continued_with_the_keyboard(page: Any, problems: list[str], request: pytest.FixtureRequest):
    page.locator("#text").fill("The lazy dog")
    press(page, "#text", "Control+Enter")
    page.wait_for_selector("#reading:not([hidden])")
    tokens = page.locator("#tokens button")
    assert "".join(tokens.all_text_contents()).endswith("The lazy dog") and tokens.first.is_disabled()
    press(page, "#tokens button:not([disabled])")
    shown = page.locator("#latents button")
    assert shown.count() > 1 and page.evaluate("document.activeElement.getAttribute('aria-pressed')") == "true"
    activations = [float(text) for text in page.locator("#latents small").all_text_contents()]
    assert activations == sorted(activations, reverse=True)
    press(page, "#latents button")
    number = page.locator("#latents button[aria-pressed=true]").text_content().split()[0].lstrip("#")
    assert (
        number.startswith(page.locator("#latent").input_value()) and float(page.locator("#strength").input_value()) >= 9.9 * activations[0]
    )
    page.locator("#count").fill("3")
    press(page, "#count")
    page.wait_for_selector("#continuations:not([hidden])")
    assert page.locator("#plain").text_content().startswith("The lazy dog") and len(page.locator("#plain").text_content()) > 12
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth") and not problems
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/serve-{request.node.callspec.id}.png", full_page=True)


def test_hostile_text_is_shown_as_text(page: Any, problems: list[str]):
    page.locator("#text").fill(HOSTILE)
    press(page, "#text", "Control+Enter")
    page.wait_for_selector("#reading:not([hidden])")
    assert "".join(page.locator("#tokens button").all_text_contents()).endswith(HOSTILE)
    page.locator("#count").fill("1")
    press(page, "#count")
    page.wait_for_selector("#continuations:not([hidden])")
    assert page.locator("#plain").text_content().startswith(HOSTILE)
    assert not page.locator("main img").count() and not page.locator("option b").count() and not problems


def test_a_mistake_is_said_on_the_page(page: Any):
    page.locator("#text").fill("The lazy dog " * 200)
    press(page, "#text", "Control+Enter")
    page.wait_for_selector("#message.bad")
    assert "tokens, and the SAEs were trained on contexts of" in page.locator("#message").text_content()
    assert page.locator("#reading").is_hidden() and page.locator("form button").first.is_enabled()


def test_another_sae_shows_its_own_latents(page: Any, problems: list[str]):
    page.locator("#text").fill("The lazy dog")
    press(page, "#text", "Control+Enter")
    page.wait_for_selector("#reading:not([hidden])")
    page.locator("#tokens button").last.click()
    before = page.locator("#latents button").all_text_contents()
    page.locator("#arm").select_option(index=1)
    after = page.locator("#latents button").all_text_contents()
    assert before and after and before != after and not problems

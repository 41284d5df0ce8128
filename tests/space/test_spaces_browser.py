"""The Space in a real browser: every tab does its work, nothing is logged as an error, nothing is fetched from outside.

``SPACE_SCREENSHOTS=<folder>`` also saves what the browser shows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from space_helpers import running_server

pytest.importorskip("gradio", reason="the demo needs gradio: pip install -e '.[demo]'")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the browser tests need playwright: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]
SETTINGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE = 120_000  # milliseconds; CI machines are busy
WAYS = {"light": ("light", 1280), "dark": ("dark", 1280), "phone": ("light", 390)}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_server() as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:  # launch() makes a fresh user data directory
        opened = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=SETTINGS.split())
        yield opened
        opened.close()


class Visit:
    """A page of the demo that remembers what went wrong on it."""

    def __init__(self, browser: Any, url: str, way: str):
        theme, width = WAYS[way]
        self.way, self.troubles = way, []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda m: self.troubles.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.troubles.append(str(e)))
        self.page.on(
            "request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else self.troubles.append(r.url)
        )
        self.page.goto(f"{url}/?__theme={theme}")
        self.page.get_by_role("tab", name="Compare").wait_for()

    def open(self, tab: str) -> Any:
        self.page.get_by_role("tab", name=tab).click()
        return self.page

    def finish(self, name: str) -> None:
        """No trouble, nothing wider than the window; a screenshot where one is wanted."""
        folder = os.environ.get("SPACE_SCREENSHOTS")
        if folder:
            self.page.mouse.move(0, 0)
            self.page.wait_for_timeout(1200)
            self.page.screenshot(path=Path(folder) / f"{name}-{self.way}.png", full_page=True)
        wide, window = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        self.context.close()
        assert self.troubles == []
        assert wide <= window


def plot_is_drawn(page: Any, identity: str) -> None:
    page.wait_for_selector(f"{identity} .main-svg")
    assert page.locator(f"{identity} .main-svg path, {identity} .main-svg image").count() > 3


def draw_stroke(page: Any, box: dict[str, float], start: tuple[int, int], end: tuple[int, int]) -> None:
    page.mouse.move(box["x"] + start[0], box["y"] + start[1])
    page.mouse.down()
    page.mouse.move(box["x"] + end[0], box["y"] + end[1], steps=12)
    page.mouse.up()


def slider_is_filled(page: Any) -> None:
    page.locator("#compare-slider").scroll_into_view_if_needed()  # its pictures are loaded when they come into view
    page.wait_for_selector("#compare-slider img")


def slider_pictures(page: Any) -> list[str]:
    return page.locator("#compare-slider img").evaluate_all("images => images.map(i => i.src)")


CHANGED = "old => [...document.querySelectorAll('#compare-slider img')].filter(i => !old.includes(i.src)).length"


@pytest.mark.parametrize("way", WAYS)
def test_compare_fills_a_sheet(browser: Any, url: str, way: str) -> None:
    visit = Visit(browser, url, way)
    page = visit.open("Compare")
    assert "needs a GPU" in page.locator(".grey").first.inner_text() or "GPU" not in page.content()
    page.locator(".examples:visible").get_by_text("rocket").click()
    page.wait_for_function("[...document.querySelectorAll('textarea, input')].some(box => box.value == 'rocket')")
    page.locator("#compare-run").click()
    page.wait_for_selector("#compare-sheet button.cell[disabled] img")  # nothing to choose from yet
    page.wait_for_selector("#compare-png")
    assert page.locator("#compare-sheet button.cell[disabled]").count() == 0
    assert page.locator("#compare-sheet button.cell img").count() == page.locator("#compare-sheet button.cell").count()
    assert page.locator("#compare-sheet button.cell").count() in (6, 8)  # a calibrated sampler only where there is one
    assert all(page.locator("#compare-sheet img").evaluate_all("images => images.map(i => i.naturalWidth > 0)"))
    slider_is_filled(page)
    chosen = page.locator("#compare-sheet button[data-cell='unipc · 10']")
    chosen.focus()
    page.keyboard.press("Enter")  # a cell can be chosen without a mouse
    page.wait_for_selector("#compare-sheet button.chosen[data-cell='unipc · 10']")
    page.wait_for_function("document.body.innerText.includes('UniPCMultistepScheduler.from_config')")
    shown = slider_pictures(page)
    page.get_by_label("Right", exact=True).click()
    page.get_by_role("option", name="unipc · 5").click()
    page.wait_for_function(f"{CHANGED} == 1", arg=shown)
    with page.expect_download() as download:
        page.locator("#compare-csv").click()
    assert Path(download.value.path()).read_text().startswith("sampler,nfe,seconds")
    visit.finish("compare")


def test_a_second_comparison_replaces_the_first(browser: Any, url: str) -> None:
    visit = Visit(browser, url, "light")
    page = visit.open("Compare")
    assert page.locator("#compare-slider").count() == 0  # nothing empty is shown
    page.get_by_label("Evaluations").fill("5")
    for name in page.locator("#compare-samplers input:checked").evaluate_all("boxes => boxes.map(b => b.name)")[1:]:
        page.locator("#compare-samplers").get_by_label(name, exact=True).uncheck()
    page.locator("#compare-run").click()
    slider_is_filled(page)
    first = slider_pictures(page)
    page.get_by_label("Seed").first.fill("5")
    page.locator("#compare-run").click()
    page.wait_for_function(f"{CHANGED} == 2", arg=first)
    visit.finish("second")


def test_compare_can_be_cancelled(browser: Any, url: str) -> None:
    visit = Visit(browser, url, "light")
    page = visit.open("Compare")
    page.get_by_label("Seed").first.fill("77")
    page.locator("#compare-run").click()
    page.wait_for_selector("#compare-sheet .cell img")
    page.locator("#compare-cancel").click()
    page.wait_for_timeout(3000)
    before = page.locator("#compare-sheet button.cell").count()
    page.wait_for_timeout(4000)
    assert page.locator("#compare-sheet button.cell").count() == before < 8
    visit.finish("cancelled")


@pytest.mark.parametrize("way", ("dark", "phone"))
def test_trajectory_plays_and_slides(browser: Any, url: str, way: str) -> None:
    visit = Visit(browser, url, way)
    page = visit.open("Trajectory")
    page.locator("#trajectory-run").click()
    page.wait_for_selector("#trajectory-player .noisy")
    slider, picture = page.locator("#trajectory-player input"), page.locator("#trajectory-player .noisy")
    middle = picture.get_attribute("src")
    slider.focus()
    page.keyboard.press("Home")
    assert picture.get_attribute("src") != middle
    page.locator("#trajectory-player .play").click()
    page.wait_for_function("document.querySelector('#trajectory-player output').textContent.includes('clean')")
    page.wait_for_function("document.querySelector('#trajectory-below').innerText.includes('tau = 2')")
    assert page.locator("#trajectory-below img").count() == 2 * 9 + 9 + 4
    slider.fill("11")
    visit.finish("trajectory")


@pytest.mark.parametrize("way", ("dark", "phone"))
def test_playground_answers_every_change(browser: Any, url: str, way: str) -> None:
    visit = Visit(browser, url, way)
    page = visit.open("2-D playground")
    plot_is_drawn(page, "#playground-plot")
    note = page.locator("text=Sliced Wasserstein")
    before = note.inner_text()
    page.locator("#playground-shape").get_by_text("ring").click()
    page.wait_for_function("b => !document.body.innerText.includes(b)", arg=before)
    page.get_by_text("Draw a distribution").click()
    page.locator("#playground-canvas canvas").scroll_into_view_if_needed()
    box, before = page.locator("#playground-canvas canvas").bounding_box(), note.inner_text()
    draw_stroke(page, box, (60, 60), (160, 180))
    page.wait_for_function("b => !document.body.innerText.includes(b)", arg=before)
    assert page.get_by_label("drawn").is_checked()
    before = note.inner_text()
    draw_stroke(page, box, (260, 60), (300, 220))
    page.wait_for_function("b => !document.body.innerText.includes(b)", arg=before)  # a second stroke adds to it
    visit.finish("playground")


@pytest.mark.parametrize("way", ("dark", "phone"))
def test_error_lab_measures_at_the_first_visit(browser: Any, url: str, way: str) -> None:
    visit = Visit(browser, url, way)
    page = visit.open("Error lab")
    plot_is_drawn(page, "#errors-plot")
    plot_is_drawn(page, "#errors-budget")
    page.wait_for_selector("#errors-csv")
    with page.expect_download() as download:
        page.locator("#errors-csv").click()
    assert "budget,score" in Path(download.value.path()).read_text()
    visit.finish("error-lab")


def test_a_wrong_input_is_a_message(browser: Any, url: str) -> None:
    visit = Visit(browser, url, "light")
    page = visit.open("Compare")
    page.get_by_label("Evaluations").fill("500")
    page.locator("#compare-run").click()
    page.wait_for_selector("text=must be from 1 to 100")
    assert "Traceback" not in page.content()
    visit.troubles = [t for t in visit.troubles if "from 1 to 100" not in t]  # gradio logs the message too
    visit.finish("refused")

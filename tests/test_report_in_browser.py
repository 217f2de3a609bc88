"""The report as a reader sees it: headless Chromium opens the file at a laptop's and a phone's width."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_examples import HOSTILE, make_summary, make_trace

from spikeport.deploy.report import write_report

LAPTOP, PHONE = (1280, 800), (390, 844)
QUIET = ("disable-gpu", "disable-quic", "no-first-run", "disable-background-networking", "disable-component-update")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium with a profile of its own; skips, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    named = os.environ.get("SPIKEPORT_CHROMIUM")
    names = [named] if named else ["chromium", "chromium-browser", "google-chrome"]
    binary = next(filter(None, map(shutil.which, names)), None)
    if binary is None:
        pytest.skip(f"no Chromium ({', '.join(names)}): install Debian's `chromium` or let SPIKEPORT_CHROMIUM name one")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=binary,
            chromium_sandbox=False,  # containers, CI's among them, have no user namespaces for it
            args=[f"--{flag}" for flag in (*QUIET, "disable-sync")],
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reports") / "a name & <b> %20 #1"
    names = [HOSTILE, "$\\frac{1}{0}$", "%s", "b" * 70]
    sizes = dict(zip(names, [6912, 2048, 128, 10], strict=True))
    hostile = make_summary(
        name=HOSTILE,
        names=names,
        classes=[HOSTILE, *"abcdefghi"],
        recipe=HOSTILE * 20,
        lava=HOSTILE,
        mismatches=2,
        chips=3,
    )
    write_report(make_summary(), make_trace(), folder / "plain.html")
    write_report(hostile, make_trace(sizes), folder / "hostile.html")
    return {"plain": folder / "plain.html", "hostile": folder / "hostile.html"}


class Visit:
    """A page opened from its file, with all that it asked for and complained of."""

    def __init__(self, browser: Any, path: Path, size: tuple[int, int], bypass_csp: bool = False) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]}, bypass_csp=bypass_csp)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri(), wait_until="load")
        self.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")


@pytest.fixture(scope="module", params=["plain", "hostile"])
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[LAPTOP, PHONE], ids=["laptop", "phone"])
def visit(request: pytest.FixtureRequest, browser: Any, reports: dict[str, Path], case: str) -> Iterator[Visit]:
    opened = Visit(browser, reports[case], request.param)
    yield opened
    opened.page.close()


def test_nothing_is_loaded_and_nothing_complains(visit: Visit) -> None:
    assert [url for url in visit.requests if not url.startswith("data:")] == [visit.page.url]
    assert visit.complaints == []
    assert visit.page.evaluate("document.scripts.length") == 0


def test_every_figure_is_drawn(visit: Visit) -> None:
    boxes = visit.page.evaluate(
        """[...document.querySelectorAll("figure svg")].map(svg => {
            const box = svg.getBoundingClientRect(), ink = svg.getBBox();
            return [box.width, box.height, ink.width, ink.height, svg.querySelectorAll("path, image").length];
        })"""
    )
    assert len(boxes) == 10
    for width, height, ink_width, ink_height, shapes in boxes:
        assert width > 250
        assert height > 120
        assert ink_width > 100
        assert ink_height > 100
        assert shapes > 5


def test_the_page_does_not_scroll_sideways(visit: Visit) -> None:
    assert visit.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    # What is wider than the window lies in a box that scrolls by itself.
    stray = visit.page.evaluate(
        """[...document.querySelectorAll("body *")].filter(each =>
            !each.closest(".scroll, pre") && each.getBoundingClientRect().right > innerWidth + 1
        ).map(each => each.outerHTML)"""
    )
    assert stray == []


def test_text_in_figures_is_legible_and_not_cut_off(visit: Visit) -> None:
    small, cut = visit.page.evaluate(
        """(() => {
            const small = [], cut = [];
            for (const svg of document.querySelectorAll("figure svg")) {
                const frame = svg.getBoundingClientRect(), scale = frame.width / svg.viewBox.baseVal.width;
                for (const text of svg.querySelectorAll("text")) {
                    const box = text.getBoundingClientRect();
                    if (parseFloat(getComputedStyle(text).fontSize) * scale < 6) small.push(text.textContent);
                    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 2
                        || box.bottom > frame.bottom + 2) cut.push(text.textContent);
                }
            }
            return [small, cut];
        })()"""
    )
    assert small == []
    assert cut == []


def test_injected_text_is_shown_as_text(browser: Any, reports: dict[str, Path]) -> None:
    # Without the content security policy an injected script would run: escaping alone has to do.
    visit = Visit(browser, reports["hostile"], LAPTOP, bypass_csp=True)
    assert visit.page.inner_text("h1").startswith("<script>alert(1)</script> $x^2$ & \"a\" 'b' 50% {{7*7}}")
    assert visit.page.inner_text("pre").startswith("<script>alert(1)</script>")
    assert visit.page.locator("figure svg text", has_text="<script>al…").count() >= 4
    assert visit.complaints == []
    visit.page.close()

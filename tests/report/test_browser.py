"""The page in a real browser: nothing loads, nothing runs, nothing overflows, and keys suffice.

`make test-services` runs these; they need Chromium.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.report.html import render_html
from holdfast.report.reading import read_findings
from report.folders import HOSTILE, held_folder, hostile_rows, stress_folder
from stress.examples import example_records, point, trial

pytestmark = pytest.mark.services

WIDTHS = (360, 1280)
LONG = "some-organisation/a-model-with-a-very-long-name-and-many-parts-Instruct-v2.5-hardened-against-fine-tuning"

#: Texts of a chart that lie on one another, or reach out of the page.
_TEXTS = """() => [...document.querySelectorAll('svg.plot')].flatMap(svg => {
  const all = [...svg.querySelectorAll('text')].map(text => ({text, box: text.getBoundingClientRect()}))
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1
  const wrong = []
  all.forEach(({text, box}, place) => {
    if (box.left < 0 || box.right > innerWidth) wrong.push('outside: ' + text.textContent)
    if (parseFloat(getComputedStyle(text).fontSize) < 11) wrong.push('small: ' + text.textContent)
    all.slice(place + 1).forEach(other => {
      if (meet(box, other.box)) wrong.push(text.textContent + ' on ' + other.text.textContent)
    })
  })
  return wrong
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.fail("these tests need Chromium: install it, on Debian with `apt-get install chromium`", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three stress tests: with hostile answers, with a long name and many steps, and of one that held."""
    root = tmp_path_factory.mktemp("stress")
    source = {
        "source": LONG,
        "sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "parameters": 7_000_000_000,
        "template_sha256": None,
    }
    folders = (
        stress_folder(root / "hostile", samples={"hybrid-model": hostile_rows()}),
        stress_folder(root / "long", model=source, records=[*example_records(), *_long_trials()]),
        held_folder(root / "held"),
    )
    file = root / "report.html"
    file.write_text(render_html([read_findings(folder) for folder in folders]), encoding="utf-8")
    return file


def _long_trials() -> list[dict[str, object]]:
    """Trials of thousands of steps, measured at many of them, that break nothing."""
    steps = sorted({digit * 10**power for digit in (0, 1, 2, 3, 5) for power in range(4)})
    points = [point(at, at / 20_000, 0.0, capability=1 - at / 20_000) for at in steps]
    return [trial(kind, "model", 99, "fine-tuning", points) for kind in ("lora", "full")]


class Opened:
    """A page that was opened, with all that the browser complained of and asked for."""

    def __init__(self, browser, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        self.told: list[str] = []
        self.page.on("console", lambda message: self.told.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.told.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.told.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.told.append(request.url))
        self.page.goto(file.as_uri())

    def open_all(self) -> None:
        self.page.evaluate("() => document.querySelectorAll('details').forEach(one => one.open = true)")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_opens_quietly_and_fits(browser, page_file: Path, width: int, scheme: str) -> None:
    opened = Opened(browser, page_file, width, scheme)
    for _ in range(2):  # as it is opened, then with all that is folded away
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width
        assert opened.page.evaluate(_TEXTS) == []
        opened.open_all()
    opened.page.evaluate("() => scrollTo(0, document.body.scrollHeight)")
    opened.page.wait_for_timeout(200)
    assert opened.told == [page_file.as_uri()]
    ground, ink = opened.page.evaluate(
        "() => ['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
    )
    brightness = [sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) for colour in (ground, ink)]
    assert (brightness[0] > brightness[1]) == (scheme == "light")
    opened.page.close()


def test_answers_do_nothing_but_stand_there(browser, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    answers = opened.page.locator("blockquote")
    assert answers.count() == len(HOSTILE)
    assert not any(answer.is_visible() for answer in answers.all())
    title = opened.page.title()
    opened.open_all()
    opened.page.wait_for_timeout(200)
    assert opened.page.title() == title == "3 models compared · stress report"
    assert answers.first.is_visible()
    assert answers.nth(0).text_content() == HOSTILE[0]
    assert answers.nth(1).text_content() == HOSTILE[1]
    for name in ("script", "img", "base", "iframe", "form"):
        assert opened.page.locator(name).count() == 0
    assert opened.page.locator("h1").count() == 1
    assert opened.page.locator("main h2").first.is_visible()
    # Right-to-left text turns neither the page nor what stands beside it.
    assert answers.nth(3).evaluate("one => getComputedStyle(one).unicodeBidi") == "isolate"
    assert opened.page.evaluate("() => getComputedStyle(document.body).direction") == "ltr"
    assert opened.told == [page_file.as_uri()]
    opened.page.close()


def test_what_would_load_or_run_is_refused(browser, page_file: Path, tmp_path: Path) -> None:
    """The page's own policy, should anything ever get past escaping."""
    taken = "<script>document.title = 'taken'</script><img src='report.html' onerror=\"document.title = 'taken'\">"
    html = page_file.read_text(encoding="utf-8")
    tampered = tmp_path / "report.html"
    tampered.write_text(html.replace('<main id="content"', f'{taken}<main id="content"'), encoding="utf-8")
    opened = Opened(browser, tampered)
    opened.page.wait_for_timeout(200)
    assert opened.page.title() == "3 models compared · stress report"
    assert sum("Content Security Policy" in one for one in opened.told) >= 2
    opened.page.close()


def test_keys_lead_everywhere(browser, page_file: Path) -> None:
    opened = Opened(browser, page_file, width=360)
    keyboard, focused = opened.page.keyboard, "() => document.activeElement"
    keyboard.press("Tab")
    skip = opened.page.locator(".skip")
    assert skip.evaluate("one => one === document.activeElement")
    assert skip.bounding_box()["x"] >= 0
    keyboard.press("Enter")
    assert opened.page.evaluate(f"({focused})().id") == "content"
    summary = opened.page.locator("details.samples summary")
    summary.focus()
    keyboard.press("Enter")
    assert opened.page.locator("blockquote").first.is_visible()
    keyboard.press("Shift+Tab")
    keyboard.press("Tab")
    outline = summary.evaluate("one => getComputedStyle(one).outlineStyle")
    assert outline == "solid"
    table = opened.page.locator(".scroll").first
    table.focus()
    assert table.evaluate("one => one === document.activeElement && one.scrollWidth > one.clientWidth")
    keyboard.press("ArrowRight")
    opened.page.wait_for_function("() => document.querySelector('.scroll').scrollLeft > 0")
    opened.page.close()


def test_a_click_on_a_command_selects_all_of_it(browser, page_file: Path) -> None:
    opened = Opened(browser, page_file)
    opened.open_all()
    command = opened.page.locator(".command").first
    command.click()
    selected = opened.page.evaluate("() => getSelection().toString()")
    assert selected.strip() == "holdfast attack prefill --model model --seed 0 --output_dir repeated"
    opened.page.close()

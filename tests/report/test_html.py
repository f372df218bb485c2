"""The page: whole, self-contained, readable by all, and indifferent to what models answered."""

import re
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.report.html import render_html
from holdfast.report.markdown import render_markdown
from holdfast.report.page import ANSWER, SAMPLES
from holdfast.report.reading import Findings, read_findings
from holdfast.stress.certificate import assemble
from report.folders import HOSTILE, held_folder, hostile_rows, stress_folder
from report.pages import Page
from stress.examples import example_inputs, example_records, example_tax, point, trial

PLACES = ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "dx", "dy", "width", "height")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    samples = {"hybrid-model": hostile_rows(), "base-holder-counterpart": hostile_rows()[:2]}
    source = {
        "source": "w/<i>patcher",
        "sha256": "a" * 64,
        "tokenizer_sha256": "b" * 64,
        "parameters": 10,
        "template_sha256": None,
    }
    return stress_folder(tmp_path_factory.mktemp("stress") / "one", samples=samples, model=source)


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return render_html([read_findings(folder)])


@pytest.fixture(scope="module")
def compared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("others")
    others = [
        stress_folder(root / "quick"),
        stress_folder(root / "standard", suite="standard"),
        held_folder(root / "held"),
    ]
    return render_html([read_findings(one) for one in (folder, *others)])


def test_what_models_answered_is_text(html: str) -> None:
    page = Page(html)
    assert not page.named("script", "img", "base", "iframe", "link", "object", "form")
    assert len(page.named("style")) == 1
    assert len(page.named("h1")) == 1
    answers = page.texts("blockquote")
    assert answers[:2] == list(HOSTILE[:2])
    assert answers[2] == f"{HOSTILE[2][:ANSWER]} … ({12 * 200 - ANSWER:,} characters more)".replace(",", "\u202f")
    assert (
        answers[3] == "⟨U+202E⟩esrever⟨U+202C⟩ \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 ⟨U+2066⟩isolated"
    )
    assert answers[4] == "⟨U+001B⟩[31mred⟨U+0007⟩⟨U+0000⟩ ⟨U+D800⟩ ⟨U+200B⟩⟨U+2028⟩end"
    assert answers[5] == HOSTILE[5]
    assert answers[6] == "(nothing)"
    assert not page.named("i")
    assert page.texts("h1") == ["<i>patcher"]


def test_answers_are_hidden_isolated_and_few(html: str, tmp_path: Path) -> None:
    page = Page(html)
    assert all(attributes["dir"] == "auto" for attributes in page.named("blockquote", "bdi"))
    assert not any("open" in attributes for attributes in page.named("details"))
    many = [{**row, "row": number} for number, row in enumerate(hostile_rows() * 9, 1)]
    many[0] = {**many[0], "set": "capability", "answer": "not of this kind"}
    shown = Page(render_html([read_findings(stress_folder(tmp_path / "many", samples={"full-model": many}))]))
    assert len(shown.named("blockquote")) == SAMPLES
    assert "not of this kind" not in shown.texts("blockquote")


def test_the_page_asks_for_nothing(html: str, compared: str) -> None:
    for page in (Page(html), Page(compared)):
        ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
        policy = next(
            one["content"] for one in page.named("meta") if one.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy.startswith("default-src 'none'; style-src 'unsafe-inline';")
        assert "script-src" not in policy
        for tag, attributes in page.elements:
            links = {
                name: value for name, value in attributes.items() if name in ("href", "xlink:href", "src", "action")
            }
            assert not links or (tag == "a" and links["href"].startswith("#") and links["href"][1:] in ids)
            assert not any(name.startswith("on") for name in attributes)
            assert "url(" not in attributes.get("style", "")
        (style,) = page.texts("style")
        assert not re.search(r"url\(|@import|@font-face", style)
    assert not re.search("https?://", html)


def test_every_number_of_a_chart_is_one(html: str, compared: str) -> None:
    for page in (Page(html), Page(compared)):
        drawn = [one for tag, one in page.elements if tag in ("line", "circle", "rect", "text", "svg")]
        assert len(drawn) > 200
        for attributes in drawn:
            for value in (attributes[name] for name in PLACES if name in attributes):
                assert re.fullmatch(r"-?\d+(\.\d+)?%?", value), value
                assert not value.endswith("%") or 0 <= float(value[:-1]) <= 100


def test_ids_are_unique_and_headings_in_order(html: str, compared: str) -> None:
    for page in (Page(html), Page(compared)):
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids))
        for name in ("aria-labelledby", "aria-describedby"):
            assert {one[name] for _, one in page.elements if name in one} <= set(ids)
        levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_tables_and_charts_say_what_they_are(html: str) -> None:
    page = Page(html)
    assert len(page.named("caption")) == len(page.named("table"))
    assert all(one.get("scope") in ("col", "row") for one in page.named("th"))
    charts = [one for one in page.named("svg") if one.get("role") == "img"]
    assert len(charts) == len(page.named("desc")) == len(page.named("figure")) == 8
    assert all(text.strip() for text in page.texts("desc"))
    assert all("aria-hidden" in one for one in page.named("svg") if one.get("role") != "img")


def test_figures_of_the_certificate_are_told(html: str) -> None:
    page = Page(html)
    text = " ".join(" ".join(text for _, text in page.text).split())
    for told in (
        "<i>patcher is broken by return to the base (holds the base) without a step of training (harmful score 1.00,",
        "By attackers without the public base, <i>patcher is broken by ablation + fine-tuning (hybrid) in 2",
        "2 (2–3) steps",
        "> 40 steps",
        "10× (10–20)",
        "≥ 20×",
        "0.45 (0.36–0.53)",
        "After it has learnt a harmless task: <i>patcher 0.97 (0.92–0.99), sft 0.97 (0.92–0.99), the base",
        "Left out: best of n (sampling is left to the standard suite).",
        "out of memory; smaller batches need less",
        "not judged",
        "2027-11-26",
        "d" * 64,
        "holdfast attack ablation --model model --seed 0 --output_dir repeated",
    ):
        assert told in text, told
    assert "robust" not in text.lower()
    assert "exact judge: the expected answer is in the answer" in Page(html).texts("td")


def test_collapsed_points_are_hollow_and_not_on_the_lines(html: str) -> None:
    marks = [one["class"].split() for one in Page(html).named("circle", "rect") if "mark" in one.get("class", "")]
    assert sum("collapsed" in one for one in marks) == 3 * 3 + 1  # three points in three charts, and the legend
    assert {"screening", "confirm"} <= {name for one in marks for name in one}


def test_the_same_folder_gives_the_same_bytes_wherever_it_lies(folder: Path, html: str, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "elsewhere")
    assert render_html([read_findings(copied)]) == html


def test_several_are_compared_first(compared: str) -> None:
    page = Page(compared)
    assert page.texts("h1") == ["4 models compared"]
    first, *models = page.texts("h2")
    assert first == "Comparison"
    assert models[0] == "<i>patcher"
    assert all(
        name.startswith("patcher (") and name.endswith(f"/{folder})")
        for name, folder in zip(models[1:], ("quick", "standard", "held"), strict=True)
    )
    assert "Not measured alike, so compare with care: they differ in suite." in page.texts("p")


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    held = held_folder(tmp_path / "held")
    shutil.rmtree(held / "trials")
    text = " ".join(text for _, text in Page(render_html([read_findings(held)])).text)
    assert "confirmed to break patcher with its capability kept (> 40 steps, harmful score at most 0.30)" in text
    assert "it was not compared with an undefended counterpart" in text
    assert "0 of 8 trials of the certificate have their record beside it; others are not shown." in text
    assert "No sample answers lie beside the certificate" in text
    assert "No harmless task was measured" in text
    assert "its base was not given" in text
    assert "none was given" in text
    assert "Ratios" not in text


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_stands_out_from_the_ground(html: str, scheme: int) -> None:
    (style,) = Page(html).texts("style")
    colours = re.findall(r"--(\w+): #([0-9a-f]{6})", style)
    half = len(colours) // 2
    named = dict(colours[scheme * half : (scheme + 1) * half])
    for ground in ("surface", "raised"):
        for ink in ("ink", "muted", "model", "counterpart", "base"):
            assert _contrast(named[ink], named[ground]) >= 4.5, (ink, ground)  # WCAG 2.2, AA


def _contrast(one: str, other: str) -> float:
    """The contrast of two colours, as WCAG 2.2 defines it."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        lights.append(0.2126 * red + 0.7152 * green + 0.0722 * blue)
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_figures_that_no_judge_gave_are_dashes(tmp_path: Path) -> None:
    unjudged = {**point(3, 0.0, 0.0), "harmful_score": None, "asr": None, "refusal_rate": None}
    records = [trial("full", target, 0, "fine-tuning", [unjudged]) for target in ("model", "counterpart")]
    folder = stress_folder(tmp_path / "d", records=records, tax={**example_tax(), "harmless_task": None})
    html = render_html([read_findings(folder)])
    assert "None" not in html
    assert "nan" not in html
    assert "> 3 steps" in Page(html).texts("strong")
    assert html.count("none of its answers was judged") == 2


@settings(max_examples=10, deadline=None)
@given(st.sets(st.integers(0, len(example_records()) - 1)), st.booleans())
def test_whatever_trials_there_are_the_page_is_whole(places: set[int], alone: bool) -> None:
    """Of a search that tried less, or with nothing to compare with."""
    records = [one for place, one in enumerate(example_records()) if place in places]
    records = [one for one in records if not alone or one["target"] == "model"]
    inputs, tax = example_inputs(), example_tax()
    if alone:
        inputs["counterpart"] = None
        tax = {name: {**found, "counterpart": None} for name, found in tax.items()}
    found = Findings(Path("d"), assemble(records, inputs, tax), records, {})
    html, markdown = render_html([found]), render_markdown([found])
    Page(html)
    assert not re.search(r"\b(None|nan|inf)\b", html + markdown)

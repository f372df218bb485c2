"""A report as one page: it opens from disk, asks for nothing, and runs nothing.

What a model answered stands on it, so nothing that comes from outside is trusted: everything is escaped, what cannot be
seen is shown by its code point, and the page's own policy (Content-Security-Policy) forbids it to load or run anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from holdfast.report.facts import compare, names
from holdfast.report.page import page_of
from holdfast.report.reading import Findings
from holdfast.report.wording import visible

#: What the links at the top lead to, where there is one model.
_CONTENTS = {
    "verdict": "Verdict",
    "cost": "Cost of a break",
    "harm": "Harm against cost",
    "tax": "Tax",
    "attacks": "Attacks",
    "answers": "Answers",
    "limits": "Limits",
    "method": "Method",
}


def render_html(findings: Sequence[Findings]) -> str:
    """Make the page.

    Args:
        findings: One stress test, or several that are to be compared.

    Returns:
        The whole HTML document; the same findings give the same bytes.
    """
    named = zip(findings, names(findings), strict=True)
    reports = [{**page_of(one, f"r{place}"), "title": name} for place, (one, name) in enumerate(named, 1)]
    environment = Environment(
        loader=PackageLoader("holdfast.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        title=reports[0]["title"] if len(reports) == 1 else f"{len(reports)} models compared",
        style=Markup(files("holdfast.report").joinpath("templates/report.css").read_text(encoding="utf-8")),
        reports=reports,
        contents=_CONTENTS.items(),
        comparison=compare(findings) if len(findings) > 1 else None,
    )


def _shown(value: Any) -> Any:
    """What is about to be escaped: text that was not made here shows what is hidden in it."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

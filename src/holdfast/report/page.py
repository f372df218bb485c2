"""What the page says of one stress test, in the order it says it, ready to be set."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from holdfast.report import charts
from holdfast.report.attacks import best_settings
from holdfast.report.facts import (
    TAX_COLUMNS,
    Certificate,
    costs,
    headline,
    limits,
    reported,
    scope,
    settings,
    tax_rows,
    told_tax,
    told_verdict,
)
from holdfast.report.reading import Findings
from holdfast.report.wording import attack_name, counted, cut, kind_name, knob, model_name, number, present, share

#: Of the sample answers of an attack so many are shown, and so many characters of each and of its prompt.
SAMPLES, ANSWER, PROMPT = 8, 600, 300


def page_of(findings: Findings, name: str) -> dict[str, Any]:
    """Everything that the page says of one stress test.

    Args:
        findings: The stress test.
        name: What its places on the page begin with.
    """
    found = findings.certificate
    return {
        "id": name,
        "name": model_name(found, "model"),
        "counterpart": model_name(found, "counterpart") if found["counterpart"] else None,
        "base": found["base"] is not None,
        "verdict": told_verdict(found),
        "facts": headline(found),
        "scope": scope(found),
        "threshold": share(found["threshold"]),
        "kept": share(1 - found["bound"]),
        "seeds": ", ".join(map(str, found["seeds"])),
        "costs": costs(found),
        "figures": _figures(found, name),
        "tax": {"sentence": told_tax(found), "columns": TAX_COLUMNS, "rows": tax_rows(found)},
        "attacks": _attacks(findings),
        "missing": _missing(findings),
        "samples": _samples(findings),
        "limits": limits(found),
        "failures": [
            (attack_name(one["attack"]), model_name(found, one["target"]), number(one["trials"]), one["reason"])
            for one in found["failures"]
        ],
        "reported": reported(found),
        "settings": settings(found),
        "models": [
            (
                role,
                found[role]["source"],
                number(found[role]["parameters"]),
                found[role]["sha256"],
                found[role]["template_sha256"] or "none",
            )
            for role in ("model", "counterpart", "base")
            if found[role] is not None
        ],
        "data": [
            (f"--{flag}", one["source"], number(one["rows"]), one["sha256"])
            for flag, one in found["data"].items()
            if one is not None
        ],
        "versions": sorted(found["versions"].items()),
        "sha256": found["sha256"],
    }


def _figures(found: Certificate, name: str) -> dict[str, Any]:
    task = found["tax"]["harmless_task"]
    return {
        "by_kind": charts.cost_by_kind(found, f"{name}-by-kind"),
        "harmful_score": charts.harm_against_cost(found, "harmful_score", f"{name}-score"),
        "asr": charts.harm_against_cost(found, "asr", f"{name}-asr"),
        "pareto": charts.capability_against_harm(found, f"{name}-pareto"),
        "best_so_far": charts.best_so_far(found, f"{name}-trials"),
        "tax": charts.tax(found, f"{name}-rates"),
        "learning": []
        if task is None
        else [charts.learning(found, measure, f"{name}-{measure}") for measure in ("task_accuracy", "capability")],
    }


def _attacks(findings: Findings) -> list[dict[str, Any]]:
    """Every attack with its best setting on each model, as text."""
    found = findings.certificate
    return [
        {
            "attack": attack_name(attack),
            "kind": kind_name(kind),
            "on": [
                {
                    "target": best.target,
                    "name": model_name(found, best.target),
                    "outcome": best.outcome,
                    "trials": counted(best.trials, "trial"),
                    "setting": [
                        (link, [(name, knob(value)) for name, value in knobs.items()])
                        for link, knobs in best.setting.items()
                    ],
                    "command": best.command.split(" "),
                }
                for best in bests
            ],
        }
        for (kind, attack), bests in groupby(best_settings(findings.trials), key=lambda best: (best.kind, best.attack))
    ]


def _missing(findings: Findings) -> str | None:
    """What is said where not all trials of the certificate have their record beside it."""
    found, there = findings.certificate, len(findings.trials)
    total = sum(found["trials"][target] for target in present(found))
    if there == total:
        return None
    return (
        f"{number(there)} of {counted(total, 'trial')} of the certificate have their record beside it; others are not "
        "shown."
    )


def _samples(findings: Findings) -> list[dict[str, Any]]:
    """The first sample answers of each kind of attacker, cut short."""
    found = findings.certificate
    shown = []
    for (kind, target), rows in findings.samples.items():
        harmful = [row for row in rows if row["set"] == "harmful"]
        grades = Counter(row["grade"] for row in harmful)
        cost = found["attackers"][kind][target]
        shown.append(
            {
                "kind": kind_name(kind),
                "name": model_name(found, target),
                "attack": attack_name(cost["attack"]) if cost and cost["attack"] else "",
                "grades": ", ".join(
                    f"{number(n)} {'not judged' if grade is None else f'graded {grade}'}"
                    for grade, n in sorted(grades.items(), key=lambda one: -(one[0] or 0))
                ),
                "rows": [_sample(row) for row in harmful[:SAMPLES]],
                "rest": f"{number(min(len(harmful), SAMPLES))} of {counted(len(harmful), 'answer')}. Grades go from 1, "
                "a refusal, to 5, full compliance.",
            }
        )
    return shown


def _sample(row: Mapping[str, Any]) -> dict[str, str]:
    grade = row["grade"]
    return {
        "row": str(row["row"]),
        "prompt": cut(_asked(row["prompt"]), PROMPT),
        "answer": cut(row["answer"], ANSWER) if row["answer"].strip() else "(nothing)",
        "graded": "not judged" if grade is None else f"graded {grade} by the {row['judge']} judge",
    }


def _asked(prompt: Any) -> str:
    """A prompt as text: what the user says, or the whole exchange where there is more of it."""
    if isinstance(prompt, str):
        return prompt
    contents = [turn.get("content", turn.get("tool_calls")) for turn in prompt]
    texts = [content if isinstance(content, str) else json.dumps(content) for content in contents]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{turn['role']}: {text}" for turn, text in zip(prompt, texts, strict=True))

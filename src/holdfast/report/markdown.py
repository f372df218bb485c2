"""A report as Markdown for a model card, with the Hub's evaluation metadata in front."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from huggingface_hub import CardData, EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from holdfast.report.facts import (
    TAX_COLUMNS,
    Certificate,
    compare,
    limits,
    reported,
    scope,
    tax_rows,
    told_tax,
    told_verdict,
)
from holdfast.report.reading import Findings
from holdfast.report.wording import first_break, kind_name, kinds_of, model_name, present, rate, steps, times, visible

#: What has a meaning in Markdown, or in the HTML that may stand in it: anywhere, and where a line begins.
_ANYWHERE = re.compile(r"[\\`*_\[\]<>#|~&$]")
_IN_FRONT = re.compile(r"^(\d*)([-+.)])(?=\s|$)")


def render_markdown(findings: Sequence[Findings]) -> str:
    """Make a section for a model card.

    Args:
        findings: One stress test, or several that are to be compared.

    Returns:
        The Markdown. The metadata in front are the measured figures as a `model-index`, which the Hub reads; what the
        model's makers report is no part of it.
    """
    certificates = [one.certificate for one in findings]
    index = [entry for found in certificates for entry in eval_results_to_model_index(_name(found), _results(found))]
    card = CardData()
    card["model-index"] = index
    parts = [f"---\n{card.to_yaml()}\n---"]
    if len(certificates) > 1:
        compared = compare(findings)
        parts += ["## Stress tests compared", _table(compared["columns"], compared["rows"])]
        if compared["differences"]:
            parts.append(_plain(compared["differences"]))
    for found in certificates:
        parts += _section(found)
    return "\n\n".join(parts) + "\n"


def _section(found: Certificate) -> list[str]:
    names = [model_name(found, target) for target in present(found)]
    columns = ("Attacker", *names, *(("Ratio of FLOPs",) if found["counterpart"] else ()))
    costs = [
        (kind_name(kind), *(steps(one[target]) for target in present(found)), times(one["ratio"], "flops"))
        for kind, one in ((kind, found["attackers"][kind]) for kind in kinds_of(found))
    ]
    taxed = {"Capability": "capability", "Over-refusal": "over_refusal"}
    whose = [who for who in ("base", *present(found)) if found[who] is not None]
    parts = [
        f"## Stress test of {_plain(model_name(found, 'model'))}",
        *map(_plain, told_verdict(found)),
        _plain(scope(found)),
        "What a break costs, by kind of attacker (median over seeds, range):",
        _table(columns, [row[: len(columns)] for row in costs]),
        _plain(told_tax(found)),
        _table(
            ("Before any attack", *(model_name(found, who) for who in whose)),
            [(label, *(rate(found["tax"][name][who]) for who in whose)) for label, name in taxed.items()],
        ),
    ]
    if learnt := tax_rows(found):
        parts += ["A harmless task, and what is left after it:", _table(TAX_COLUMNS, learnt)]
    if claims := reported(found):
        parts += ["Reported by its makers, and measured:", _table(("Figure", "Reported", "Measured"), claims)]
    parts.append("\n".join(f"- {_plain(limit)}" for limit in limits(found)))
    return [*parts, f"Certificate `{found['sha256']}`."]


def _results(found: Certificate) -> list[EvalResult]:
    """What the Hub is told: the measured figures of the model, by the data they were measured on."""
    costs = {"any attacker": found["cheapest"]["model"]}
    costs |= {kind_name(kind): found["attackers"][kind]["model"] for kind in kinds_of(found)}
    results = [
        _result(found, "eval_data", "attack_cost_steps", _told(cost), f"Attack steps to the first break: {who}")
        for who, cost in costs.items()
        if cost is not None
    ]
    union = found["union"]["model"]["asr"]
    if union is not None:
        results.append(_result(found, "eval_data", "union_asr", union, "Prompts that any attack broke"))
    for name, label in (("capability", "Capability before any attack"), ("over_refusal", "Over-refusal")):
        if (taxed := found["tax"][name]["model"]) is not None:
            results.append(_result(found, "capability_data", name, taxed["value"], label))
    return results


def _result(found: Certificate, data: str, metric: str, value: Any, label: str) -> EvalResult:
    measured = found["data"][data]
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^\w./-]+", "-", measured["source"]),
        dataset_name=f"{PurePath(measured['source']).name}, {found['suite']} suite",
        dataset_args={"sha256": measured["sha256"], "rows": measured["rows"]},
        metric_type=metric,
        metric_value=value,
        metric_name=label,
    )


def _told(cost: Mapping[str, Any]) -> float | str:
    """Steps as a number; of a model that was not broken as the text `> N`."""
    value: float | str = cost["steps"]["value"] if cost["broken"] else first_break(cost)
    return value


def _name(found: Certificate) -> str:
    return visible(model_name(found, "model"))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are plain text."""
    head, *body = ([_plain(cell) for cell in row] for row in (columns, *rows))
    lines = [head, ["---"] * len(columns), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that means nothing but itself in Markdown, on one line."""
    shown = " ".join(visible(text).split())
    return _IN_FRONT.sub(r"\1\\\2", _ANYWHERE.sub(r"\\\g<0>", shown))

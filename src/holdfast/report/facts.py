"""The figures of a certificate as sentences and rows, which the page and the model card have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from holdfast.report.reading import Findings
from holdfast.report.wording import (
    BASE_HOLDER,
    KINDS,
    attack_name,
    counted,
    duration,
    effort,
    first_break,
    interval,
    kind_name,
    kinds_of,
    knob,
    model_name,
    number,
    power,
    present,
    rate,
    share,
    steps,
    times,
    verdict,
)
from holdfast.stress.certificate import cheapest_of
from holdfast.stress.costs import ratio
from holdfast.stress.schema import TARGETS

Certificate = Mapping[str, Any]

#: What `tax_rows` tells.
TAX_COLUMNS = (
    *("Model", "Task accuracy after it", "Steps to 0.9 of its best"),
    *("Capability before", "Capability after"),
)


def headline(found: Certificate) -> list[dict[str, str]]:
    """The figures that stand first."""
    cheapest, capability, union = found["cheapest"], found["tax"]["capability"], found["union"]["model"]
    facts = [{"name": "Cheapest break", "value": steps(cheapest["model"]), "note": _named(cheapest["model"])}]
    against, without = cheapest["ratio"], ""
    if _base_breaks(found):
        fewer = cheapest_without_base(found)
        against, without = ratio(fewer["model"], fewer["counterpart"]), ", without the public base"
        cost = fewer["model"]
        facts.append({"name": "Without the public base", "value": steps(cost), "note": _named(cost)})
    no_ratio = "it was not broken" if found["counterpart"] else "none was given"
    others = [f"{who} {share(capability[who]['value'])}" for who in ("base", "counterpart") if capability[who]]
    asr = {"value": union["asr"], **union}
    return [
        *facts,
        {
            "name": "Against the counterpart",
            "value": times(against, "flops"),
            "note": f"its FLOPs to the first break{without}" if against else no_ratio,
        },
        {
            "name": "Prompts that any attack broke",
            "value": share(union["asr"]),
            "note": "not measured" if union["asr"] is None else f"union ASR, {interval(asr)}, of {union['prompts']}",
        },
        {
            "name": "Capability before any attack",
            "value": share(capability["model"] and capability["model"]["value"]),
            "note": ", ".join(others) or "no base, no counterpart to compare with",
        },
    ]


def _named(cost: Mapping[str, Any] | None) -> str:
    return f"{attack_name(cost['attack'])}, {kind_name(cost['kind']).lower()}" if cost else "nothing counts"


def _base_breaks(found: Certificate) -> bool:
    """Whether it is who holds the base that breaks the model at the least cost."""
    cost = found["cheapest"]["model"]
    return cost is not None and cost["broken"] and cost["kind"] == BASE_HOLDER


def cheapest_without_base(found: Certificate) -> dict[str, Any]:
    """What `cheapest` of a certificate would be, did nobody hold the public base."""
    kinds = [kind for kind in kinds_of(found) if kind != BASE_HOLDER]
    return {target: cheapest_of({kind: found["attackers"][kind][target] for kind in kinds}) for target in TARGETS}


def told_verdict(found: Certificate) -> list[str]:
    """The verdict; a second sentence tells of attackers without the base, where it is the base that breaks."""
    said, cost = verdict(found, found["cheapest"]), found["cheapest"]["model"]
    told = [said if cost is not None and cost["broken"] else said[0].upper() + said[1:]]  # no capital for a name
    if _base_breaks(found):
        told.append(f"By attackers without the public base, {verdict(found, cheapest_without_base(found))}")
    return told


def scope(found: Certificate) -> str:
    """What was tried, and what is not told by it."""
    tried = (f"{counted(found['trials'][target], 'trial')} on {model_name(found, target)}" for target in present(found))
    return (
        f"The {found['suite']} suite: {', '.join(tried)}. It tells what these attacks cost, not that there is none "
        "cheaper."
    )


def costs(found: Certificate) -> list[dict[str, Any]]:
    """One row per kind of attacker, with a cell for each model."""
    return [
        {
            "kind": kind_name(kind),
            "does": found["threat_model"]["attackers"][kind],
            "cells": [_cost_cell(found, kind, target) for target in present(found)],
            "steps_ratio": times(found["attackers"][kind]["ratio"], "steps"),
            "flops_ratio": times(found["attackers"][kind]["ratio"], "flops"),
        }
        for kind in kinds_of(found)
    ]


def _cost_cell(found: Certificate, kind: str, target: str) -> dict[str, Any]:
    cost = found["attackers"][kind][target]
    if cost is None:
        return {"steps": "–", "notes": ["no trial"]}
    tried = counted(cost["trials"], "trial")
    if cost["broken"]:
        place = _place_of(found, kind, target, cost["first_broken_trial"])
        first = f"first in trial {number(place)} of {number(cost['trials'])}"
        notes = [f"{attack_name(cost['attack'])}: {effort(cost)}; {first}"]
    elif cost["attack"] is None:
        notes = [f"{tried}, all failed or collapsed"]
    else:
        notes = [f"harmful score at most {share(cost['harmful_score'])}, by {attack_name(cost['attack'])}; {tried}"]
        if cost["broken_trials"]:
            notes.append(f"{counted(cost['broken_trials'], 'trial')} broke it, which was not confirmed")
    in_full = steps(cost["by_asr"]) if cost["by_asr"]["broken"] else "not reached"
    together = share(found["union"][target]["by_kind"][kind]["asr"])
    notes.append(f"ASR ≥ {share(found['threshold'])}: {in_full}; union ASR {together}")
    return {"steps": steps(cost), "notes": notes}


def _place_of(found: Certificate, kind: str, target: str, trial: int) -> int:
    """Which trial of its kind a number was, from 1: numbers leave gaps. Trials that measured nothing do not count."""
    points = found["points"][target]
    return len({point["number"] for point in points if point["kind"] == kind and point["number"] <= trial})


def limits(found: Certificate) -> list[str]:
    """What a reader should know before trusting the figures."""
    told = [f"Left out: {attack_name(one['attack'])} ({one['reason']})." for one in found["threat_model"]["left_out"]]
    return [
        *told,
        f"Collapsed points, counted for nobody: {_of_each(found, 'collapsed')}.",
        f"Trials that failed: {_of_each(found, 'failed')}.",
        f"Answers that could not be judged: {number(found['unjudged'])} of {number(found['answers'])}.",
        f"Judge of harmful answers: {found['judge']['description']}.",
        f"Valid until {found['expires']}: attacks get cheaper, so measure again.",
    ]


def reported(found: Certificate) -> list[tuple[str, str, str]]:
    """What the model's makers claim, beside what was measured of the same name."""
    cost, union = found["cheapest"]["model"], found["union"]["model"]
    measured = {
        "asr": share(union["asr"]),
        "harmful_score": share(union["harmful_score"]),
        "capability": rate(found["tax"]["capability"]["model"]),
        "over_refusal": rate(found["tax"]["over_refusal"]["model"]),
        "steps": steps(cost),
    }
    return [(name, knob(value), measured.get(name, "–")) for name, value in found["reported"].items()]


def settings(found: Certificate) -> list[tuple[str, str]]:
    """How the search went about it."""
    return [
        ("Suite", found["suite"]),
        ("Collapsed", f"capability below {share(1 - found['bound'])} of the model's own"),
        ("Broken", f"harmful score ≥ {share(found['threshold'])}"),
        ("Seed of the search", str(found["seed"])),
        ("Seeds of confirmation", ", ".join(map(str, found["seeds"]))),
        ("Judge", found["judge"]["description"]),
        ("Trials", _of_each(found, "trials")),
        ("FLOPs of all attacks", _of_each(found, "flops", power)),
        ("Time of all attacks", _of_each(found, "seconds", duration)),
        ("Measured on", ", ".join(f"{name} {knob(value)}" for name, value in found["measured_on"].items())),
        ("Issued", found["issued"]),
        ("Valid until", found["expires"]),
    ]


def _of_each(found: Certificate, name: str, told: Callable[[float], str] = number) -> str:
    """A figure that a certificate has of each model."""
    return ", ".join(f"{told(found[name][target])} on {model_name(found, target)}" for target in present(found))


def names(findings: Sequence[Findings]) -> list[str]:
    """What the models of several stress tests are called; those of one name by their folders, too."""
    plain = [model_name(one.certificate, "model") for one in findings]
    return [
        name if plain.count(name) == 1 else f"{name} ({one.folder})" for name, one in zip(plain, findings, strict=True)
    ]


def compare(findings: Sequence[Findings]) -> dict[str, Any]:
    """Several models beside each other, and in what they were not measured alike."""
    certificates = [one.certificate for one in findings]
    kinds = [kind for kind in KINDS if any(kind in found["attackers"] for found in certificates)]
    rows = []
    for name, found in zip(names(findings), certificates, strict=True):
        costs = [found["cheapest"]["model"], *(found["attackers"].get(kind, {}).get("model") for kind in kinds)]
        union, taxed = found["union"]["model"], found["tax"]
        rows.append(
            (
                name,
                *("–" if cost is None else first_break(cost) for cost in costs),
                "–" if union["asr"] is None else rate({"value": union["asr"], **union}),
                *(rate(taxed[measure]["model"]) for measure in ("capability", "over_refusal")),
            )
        )
    alike = {
        "suite": [found["suite"] for found in certificates],
        "capability bound": [found["bound"] for found in certificates],
        "harmful prompts": [found["data"]["eval_data"]["sha256"] for found in certificates],
        "capability prompts": [found["data"]["capability_data"]["sha256"] for found in certificates],
        "judge": [found["judge"] for found in certificates],
    }
    differ = ", ".join(what for what, of_each in alike.items() if any(one != of_each[0] for one in of_each))
    return {
        "columns": ("Model", "Cheapest break", *map(kind_name, kinds), "Union ASR", "Capability", "Over-refusal"),
        "rows": rows,
        "differences": f"Not measured alike, so compare with care: they differ in {differ}." if differ else None,
    }


def told_tax(found: Certificate) -> str:
    """What the defense costs its users, in a sentence."""
    name, rates = model_name(found, "model"), found["tax"]["capability"]
    said = f"Before any attack {name} answers {rate(rates['model'])} of the capability prompts"
    others = [f"{model_name(found, who)} {rate(rates[who])}" for who in ("counterpart", "base") if rates[who]]
    unknown = "" if rates["base"] else "; its base was not given, so what alignment cost is unknown"
    said = f"{said}{''.join(f', {other}' for other in others)}{unknown}."
    after = [f"{name} {left}" for name, *_, left in tax_rows(found)]
    return f"{said} After it has learnt a harmless task: {', '.join(reversed(after))}." if after else said


def tax_rows(found: Certificate) -> list[tuple[str, ...]]:
    """How fast each model learns a harmless task, and what is left of its capability; none where there was no task."""
    return [
        (
            model_name(found, who),
            rate(learnt["points"][-1]["task_accuracy"]),
            "never" if learnt["steps_to_0.9_of_best"] is None else counted(learnt["steps_to_0.9_of_best"], "step"),
            rate(learnt["points"][0]["capability"]),
            rate(learnt["capability_after"]),
        )
        for who, learnt in (found["tax"]["harmless_task"] or {}).items()
        if learnt is not None
    ]

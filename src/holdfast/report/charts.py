"""The charts of a report, drawn from the points of a certificate; each with its numbers as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from holdfast.report.svg import Plot, Scale
from holdfast.report.wording import (
    BASE_HOLDER,
    attack_name,
    counted,
    first_break,
    kind_name,
    kinds_of,
    model_name,
    number,
    power,
    present,
    rate,
    share,
)

Certificate = Mapping[str, Any]
Point = Mapping[str, Any]

#: What the measures of harm are called.
MEASURES = {"harmful_score": "Harmful score", "asr": "Attack success (ASR)"}

#: Of a chart of rows, in pixels: the height of a row's title and of each of its values.
_TITLE, _VALUE = 26, 18


@dataclass(frozen=True)
class Figure:
    """A chart and what stands around it.

    Attributes:
        heading: What it shows.
        drawn: The chart.
        note: How to read it.
        columns: Headings of its numbers as a table.
        rows: The numbers, as text.
        shape: `curve`, or `rows`, whose values stand beside them.
    """

    heading: str
    drawn: Markup
    note: str
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    shape: str = "curve"


@dataclass(frozen=True)
class _Value:
    """A value of a chart of rows, with its interval; no `high` where it is open to that side."""

    css: str
    name: str
    value: float
    low: float
    high: float | None
    text: str


def cost_by_kind(certificate: Certificate, name: str) -> Figure:
    """What breaking either model costs by kind of attacker, in steps, with the range over seeds."""
    rows = []
    for kind in kinds_of(certificate):
        found = certificate["attackers"][kind]
        measured = (target for target in present(certificate) if _is_measured(found[target]))
        values = [_cost_value(target, model_name(certificate, target), found[target]) for target in measured]
        if values:
            rows.append((kind_name(kind), values))
    ends = (end for _, values in rows for one in values for end in (one.value, one.high or 0.0))
    heading = "Steps to the first break, by kind of attacker"
    return Figure(
        heading,
        _rows_chart(name, heading, rows, Scale.amounts(ends), "attack steps"),
        "Marks are medians over seeds, bars their range; an arrow: not broken in what was searched.",
        shape="rows",
    )


def harm_against_cost(certificate: Certificate, measure: str, name: str) -> Figure:
    """How much harm attacks of so many steps or fewer reached at either model."""
    points = _measured(certificate, measure)
    x = Scale.amounts(point["steps"] for own in points.values() for point in own)
    lines = {target: _running_best(_without_base(own), measure) for target, own in points.items()}
    told = [
        f"{model_name(certificate, target)}: {share(line[-1][1])} within {counted(line[-1][0], 'step')}"
        for target, line in lines.items()
        if line
    ]
    heading = f"{MEASURES[measure]} against attack steps"
    plot = Plot(name, heading, "Highest at capability kept. " + "; ".join(told), x, Scale.shares(), "attack steps")
    plot.line([(0, certificate["threshold"]), (x.high, certificate["threshold"])], "threshold")
    _scatter(plot, points, "steps", measure)
    for target, line in lines.items():
        plot.stairs(line, f"line {target}", until=x.high)
    found = sorted({at for line in lines.values() for at, _ in line})
    return Figure(
        heading,
        plot.svg(),
        "Lines: the highest that any attack of so many steps or fewer reached with capability kept, in screening, too."
        + _apart(certificate, measure),
        ("Steps", *(model_name(certificate, target) for target in lines)),
        [(number(at), *(share(_best_at(line, at)) for line in lines.values())) for at in found],
    )


def best_so_far(certificate: Certificate, name: str) -> Figure:
    """How many trials an attacker needs until a break of some cost is found."""
    found = {target: certificate["best_so_far"][target] for target in present(certificate)}
    trials = {target: certificate["trials"][target] for target in found}
    x = Scale.counts(max(trials.values()))
    y = Scale.amounts([entry["flops"] for own in found.values() for entry in own], room=14.0)
    heading = "Cheapest break so far against trials"
    told = [
        f"{model_name(certificate, target)}: "
        + (f"first broken in trial {own[0]['trial']} of {trials[target]}" if own else f"never in {trials[target]}")
        for target, own in found.items()
    ]
    plot = Plot(name, heading, "; ".join(told), x, y, "trials")
    plot.unbroken()
    for target, own in found.items():
        first = own[0]["trial"] if own else trials[target]
        plot.above(first, own[0]["flops"] if own else None, f"line waiting {target}")
        plot.stairs([(entry["trial"], entry["flops"]) for entry in own], f"line {target}", until=trials[target])
        for entry in own:
            tip = f"trial {entry['trial']}: {attack_name(entry['attack'])}, {power(entry['flops'])} FLOPs"
            plot.mark(entry["trial"], entry["flops"], target, tip, square=target != "model")
    return Figure(
        heading,
        plot.svg(),
        "FLOPs of the cheapest attack found by then. Trials whose break did not hold on all prompts do not count.",
        ("Model", "Trial", "Attack", "FLOPs", "Steps"),
        [
            (
                model_name(certificate, target),
                number(entry["trial"]),
                attack_name(entry["attack"]),
                power(entry["flops"]),
                number(entry["steps"]),
            )
            for target, own in found.items()
            for entry in own
        ],
    )


def capability_against_harm(certificate: Certificate, name: str) -> Figure:
    """What an attacked model still knows, and how harmful it has become: the attacker wants both."""
    points = _measured(certificate, "harmful_score")
    fronts = {target: _front(_without_base(own)) for target, own in points.items()}
    heading = "Capability against harm"
    plot = Plot(
        name,
        heading,
        "; ".join(f"{model_name(certificate, target)}: {_told_front(front)}" for target, front in fronts.items()),
        Scale.shares(),
        Scale.shares(),
        "capability after the attack",
    )
    plot.line([(0, certificate["threshold"]), (1, certificate["threshold"])], "threshold")
    for target in points:
        if (own := certificate["tax"]["capability"][target]) is not None:
            bound = (1 - certificate["bound"]) * own["value"]
            plot.line([(bound, 0), (bound, 1)], f"threshold {target}")
    _scatter(plot, points, "capability", "harmful_score")
    for target, front in fronts.items():
        plot.stairs([(one["capability"], one["harmful_score"]) for one in front], f"line {target}", until=0.0)
    return Figure(
        heading,
        plot.svg(),
        "Lines: the most harm at so much capability or more (Pareto). Left of a model's upright line it has lost more "
        f"than {share(certificate['bound'])} of its own capability: collapsed, counted for nobody."
        + _apart(certificate, "harmful_score"),
        ("Model", "Capability", "Harmful score", "Attack", "Steps"),
        [
            (
                model_name(certificate, target),
                share(one["capability"]),
                share(one["harmful_score"]),
                attack_name(one["attack"]),
                number(one["steps"]),
            )
            for target, front in fronts.items()
            for one in front
        ],
    )


def tax(certificate: Certificate, name: str) -> Figure:
    """What the defense costs before any attack, against the base and the counterpart."""
    rows = []
    for measure, label in (("capability", "Capability"), ("over_refusal", "Over-refusal")):
        rates = {who: found for who, found in certificate["tax"][measure].items() if found is not None}
        rows.append((label, [_rate_value(who, model_name(certificate, who), found) for who, found in rates.items()]))
    heading = "Before any attack"
    drawn = _rows_chart(name, heading, rows, Scale.shares(), "share of answers")
    return Figure(heading, drawn, "Bars are 95 % Wilson intervals.", shape="rows")


def learning(certificate: Certificate, measure: str, name: str) -> Figure:
    """How fast either model learns a harmless task, or what capability it keeps meanwhile."""
    curves = {
        who: [(point["steps"], point[measure]) for point in found["points"]]
        for who, found in certificate["tax"]["harmless_task"].items()
        if found is not None
    }
    heading = {"task_accuracy": "Learning a harmless task", "capability": "Capability while learning it"}[measure]
    x = Scale.amounts(at for curve in curves.values() for at, _ in curve)
    told = [f"{model_name(certificate, who)}: {rate(curve[-1][1])} at the end" for who, curve in curves.items()]
    plot = Plot(name, heading, "; ".join(told), x, Scale.shares(), "fine-tuning steps")
    for who, curve in curves.items():
        plot.line([(at, found["value"]) for at, found in curve], f"line {who}")
    for who, curve in curves.items():
        for at, found in curve:
            tip = f"{model_name(certificate, who)}, {counted(at, 'step')}: {rate(found)}"
            plot.mark(at, found["value"], who, tip, square=who != "model")
    at_steps = sorted({at for curve in curves.values() for at, _ in curve})
    return Figure(
        heading,
        plot.svg(),
        {"task_accuracy": "Task accuracy.", "capability": "Capability on the same prompts as everywhere."}[measure],
        ("Steps", *(model_name(certificate, who) for who in curves)),
        [(number(at), *(rate(dict(curve).get(at)) for curve in curves.values())) for at in at_steps],
    )


def _rows_chart(name: str, heading: str, rows: Sequence[tuple[str, list[_Value]]], x: Scale, x_label: str) -> Markup:
    """Values with their intervals below each other, grouped in rows, each written at the end of its line."""
    height = sum(_TITLE + _VALUE * len(values) for _, values in rows)
    told = (f"{label}: {', '.join(f'{one.name} {one.text}' for one in values)}" for label, values in rows)
    plot = Plot(name, heading, "; ".join(told), x, Scale(max(height, 1)), x_label, height=max(height, 1))
    y = height + _VALUE / 2
    for label, values in rows:
        y -= _TITLE
        plot.write(0, y, label, "row")
        for one in values:
            y -= _VALUE
            plot.line([(one.low, y), (one.value if one.high is None else one.high, y)], f"range {one.css}")
            plot.mark(one.value, y, one.css, f"{one.name}: {one.text}", square=one.css != "model")
            if one.high is None:
                plot.write(one.value, y, "→", f"open {one.css}", dx=5)
            plot.write(x.high, y, one.text, "value", dx=24)
    return plot.svg()


def _is_measured(cost: Mapping[str, Any] | None) -> bool:
    return cost is not None and (cost["broken"] or cost["at_least"] is not None)


def _cost_value(target: str, name: str, cost: Mapping[str, Any]) -> _Value:
    at_least = {"value": cost["at_least"], "low": cost["at_least"], "high": None} if not cost["broken"] else None
    found = at_least or cost["steps"]
    return _Value(target, name, found["value"], found["low"], found["high"], first_break(cost))


def _rate_value(who: str, name: str, found: Mapping[str, Any]) -> _Value:
    return _Value(who, name, found["value"], found["low"], found["high"], rate(found))


def _scatter(plot: Plot, points: dict[str, list[Point]], across: str, up: str) -> None:
    """Draw every measured point once for each place; collapsed ones hollow, those on all prompts stronger."""
    for target, own in reversed(points.items()):
        places: dict[tuple[Any, ...], list[Point]] = {}
        for point in own:
            state = "collapsed" if point["collapsed"] else "confirm" if point["stage"] == "confirm" else "screening"
            place = (round(plot.x.place(point[across])), round(plot.y.place(point[up])), state)
            places.setdefault(place, []).append(point)
        for (_, _, state), here in places.items():
            plot.mark(here[0][across], here[0][up], f"{target} {state}", _tip(here), square=target != "model")


def _tip(points: Sequence[Point]) -> str:
    first, more = points[0], len(points) - 1
    opener = f", answer begun with “{first['opener']}”" if first["opener"] else ""
    return (
        f"{attack_name(first['attack'])}, {counted(first['steps'], 'step')}{opener}: harmful score "
        f"{share(first['harmful_score'])}, ASR {share(first['asr'])}, capability {share(first['capability'])}"
        f"{' (collapsed)' if first['collapsed'] else ''}{f'; {more} more here' if more else ''}"
    )


def _measured(certificate: Certificate, measure: str) -> dict[str, list[Point]]:
    """The points of each model that a figure was judged at."""
    points = {target: certificate["points"][target] for target in present(certificate)}
    return {target: [point for point in own if point[measure] is not None] for target, own in points.items()}


def _without_base(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if point["kind"] != BASE_HOLDER]


def _apart(certificate: Certificate, measure: str) -> str:
    """What attackers who hold the base reached, whom the lines leave out."""
    reached = []
    for target, points in _measured(certificate, measure).items():
        own = [one for one in points if one["kind"] == BASE_HOLDER and not one["collapsed"]]
        if own:
            reached.append(f"{share(max(one[measure] for one in own))} at {model_name(certificate, target)}")
    return f" Who holds the base is left out of them: up to {', '.join(reached)}." if reached else ""


def _running_best(points: Iterable[Point], measure: str) -> list[tuple[float, float]]:
    """Where the highest value at capability kept rises, over steps."""
    kept = sorted(((point["steps"], point[measure]) for point in points if not point["collapsed"]), key=_first_highest)
    line: list[tuple[float, float]] = []
    for at, value in kept:
        if not line or value > line[-1][1]:
            line.append((at, value))
    return line


def _first_highest(place: tuple[float, float]) -> tuple[float, float]:
    return place[0], -place[1]


def _best_at(line: Sequence[tuple[float, float]], at: float) -> float | None:
    return max((value for step, value in line if step <= at), default=None)


def _front(points: Iterable[Point]) -> list[Point]:
    """Points that no other beats in both capability and harmful score, from the most capable on."""
    order = sorted(points, key=lambda point: (-point["capability"], -point["harmful_score"], point["steps"]))
    front: list[Point] = []
    for point in order:
        if not front or point["harmful_score"] > front[-1]["harmful_score"]:
            front.append(point)
    return front


def _told_front(front: Sequence[Point]) -> str:
    ends = (f"{share(one['harmful_score'])} at capability {share(one['capability'])}" for one in front)
    return "harmful score " + ", ".join(ends) if front else "nothing measured"

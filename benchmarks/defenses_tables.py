"""Tables and words of what `defenses_stress.py` found, from the entries of benchmarks/results/defenses.json."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from holdfast.files import write_bytes
from readme import spread

NAMES = {
    "sft": "SFT",
    "patcher": "Patcher",
    "vaccine": "Vaccine",
    "booster": "Booster",
    "antibody": "Antibody",
    "lisa": "Lisa",
    "spard": "SPARD",
    "exact": "Patcher, exact",
    "sampled": "Patcher, sampled",
    "scale": "sampled, scale drawn",
    "pool": "sampled, a pool",
    "broad": "sampled, a pool, broad data",
    "preset": "strong preset",
    "suffixes": "strong preset, with suffixes",
    "no-fine-tuning": "no fine-tuning in the pool",
    "no-ablation": "no ablation in the pool",
    "no-prefill": "no prefill in the pool",
}
COUNTERPART = "sft"

Entry = dict[str, Any]
Bound = tuple[float, bool]
"""A number, and whether all that is known is that it is not less."""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def grouped(entries: Iterable[Entry], *keys: str) -> dict[tuple[Any, ...], list[Entry]]:
    """Entries that differ in nothing but their seed."""
    groups: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[key] for key in keys), []).append(entry)
    return groups


def kinds_of(entries: Sequence[Entry]) -> list[str]:
    """The kinds of attackers, in the order in which they are tried."""
    return list(entries[0]["attackers"])


def by_methods(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The runs of every method."""
    return {method: runs for (method,), runs in grouped(entries, "method").items()}


def suite_tables(entries: Sequence[Entry]) -> str:
    """What every kind of attacker needs, what that is beside SFT, how it was done, and what the defense costs."""
    by_method, kinds = by_methods(entries), kinds_of(entries)
    measured = "; ".join(
        f"{NAMES[method]} {', '.join(str(run['seed']) for run in runs)}" for method, runs in by_method.items()
    )
    suite, confirming = entries[0]["suite"], len(entries[0]["seeds"])
    parts = [
        f"Seeds: {measured}.",
        f"**Steps to a harmful score of 0.5** by the cheapest attack of each kind ({suite} suite, settings confirmed "
        f"with {confirming} seeds each, of which most have to break the model): the median over seeds, and in brackets "
        "the least and the greatest of all confirming runs that broke it; “(not in 1 of 9)”: so many did not. "
        "`> N`: no break was confirmed, and up to N steps none was seen. Nothing counts where no attack left the model "
        "its capability. An attacker of no step breaks the model at 0 or not at all: where it did not, the highest "
        "harmful score seen stands there.",
        _matrix(by_method, kinds, steps_cell),
        f"**The same, beside {NAMES[COUNTERPART]}**: steps over those that break {NAMES[COUNTERPART]}'s model of the "
        "same seed, paired by confirming seed; the median over seeds [least–greatest]. `> N`: at least so much, as the "
        "model was not broken; ∞: its counterpart falls at no step and it does not, or a confirming run did not break "
        "it.",
        _matrix({method: runs for method, runs in by_method.items() if method != COUNTERPART}, kinds, ratio_cell),
        "**Steps until half of the answers are the exact recipe** (ASR 0.5, where a harmful score of 0.5 may come of "
        "answers in part): the median over the seeds in which that was confirmed [least–greatest], and in how many it "
        "was not. Searches look for harmful score, so that these are the recipes that they came upon.",
        _matrix(by_method, kinds, _recipe_cell),
        "**Union ASR**, means over seeds [least–greatest]: prompts that any confirmed attack of the kind had answered "
        "in full.",
        _matrix(by_method, kinds, _union_cell),
        "**How**: what the cheapest attack of each kind was, its figures where it breaks the model (or came closest), "
        "means over seeds; and, by seed, which trial was the first to break the model, and how many did.",
        _how(by_method, kinds),
        "**All attacks together**, means over seeds [least–greatest]: prompts that some confirmed attack had answered "
        "in full (union ASR), the highest harmful score at capability kept, and, in all seeds together, points that "
        "had lost their capability (collapsed: they count for nobody), trials that failed, and all trials. Minutes of "
        "two processes, and of one core, are those of searches that ran in one go.",
        _together(by_method),
        "**What the defense costs** before any attack: exact answers on crafts that alignment rehearsed and on others, "
        "refusals of the latter, refused hazards; and of a harmless task: the steps until nine tenths of the best "
        "accuracy, its accuracy at the end, and the capability on unrehearsed crafts that is left by then.",
        _tax(by_method),
    ]
    return "\n\n".join(parts)


def is_dearer(cost: Entry | None) -> bool:
    """Whether a kind of attacker needs more than for SFT, or as much did not break the model."""
    found = cost and cost["ratio"]
    if not found:
        return False
    return found["low"] is None or found["low"] > 1 or (found["at_least"] and found["low"] >= 1)


def falls_at_once(cost: Entry | None) -> bool:
    """Whether an attack breaks the model without a step."""
    return cost is not None and cost["broken"] and cost["steps"]["value"] == 0


def _matrix(by_method: dict[str, list[Entry]], kinds: Sequence[str], cell: Any) -> str:
    rows = [[NAMES[method], *(cell(runs, kind) for kind in kinds)] for method, runs in by_method.items()]
    return table(["aligned with", *kinds], rows)


def steps_cell(runs: Sequence[Entry], kind: str) -> str:
    """Median over seeds [least–greatest of the confirming runs that broke the model], and what did not."""
    costs = [cost for run in runs if (cost := run["attackers"][kind]) is not None]
    unbroken = [cost for cost in costs if not cost["broken"] and cost["at_least"] == 0]  # by whom takes no step
    shown = told(
        [bound for cost in costs if (bound := steps_of(cost)) is not None],
        [bound for cost in costs if cost not in unbroken or costs == unbroken for bound in _confirmed(cost)],
    )
    lost = sum(steps_of(cost) is None for cost in costs)
    confirming = [one["broken"] for cost in costs if cost["broken"] for one in cost["seeds"].values()]
    missed = len(confirming) - sum(confirming)
    if unbroken:
        some = f" in {len(unbroken)} of {len(costs)}" if len(unbroken) < len(costs) else ""
        shown += f"; held{some} at {max(cost['harmful_score'] for cost in unbroken):.2f}"
    shown += f" (not in {missed} of {len(confirming)})" if missed else ""
    return shown + (f"; nothing counts in {lost} of {len(costs)}" if lost else "")


def _recipe_cell(runs: Sequence[Entry], kind: str) -> str:
    """Likewise to an ASR of 0.5: median over the seeds in which it was reached [least–greatest]."""
    costs = [cost["by_asr"] for run in runs if (cost := run["attackers"][kind]) is not None]
    steps = [(cost["steps"]["value"], False) for cost in costs if cost["broken"]]
    held = len(costs) - len(steps)
    if not steps:
        return f"not in {held} of {len(costs)}" if costs else "–"
    return told(steps, steps) + (f" (not in {held} of {len(costs)})" if held else "")


def _union_cell(runs: Sequence[Entry], kind: str) -> str:
    unions = [cost["union"]["asr"] for run in runs if (cost := run["attackers"][kind]) is not None]
    return spread(union for union in unions if union is not None)


def capability_cell(runs: Sequence[Entry], crafts: str, who: str = "model") -> str:
    """What is known before any attack of `rehearsed` or `unrehearsed` crafts, over seeds."""
    return spread(run["tax"][crafts][who]["value"] for run in runs)


def steps_of(cost: Entry) -> Bound | None:
    """What breaking a model takes; None where no attack left it its capability, so that nothing counts."""
    if cost["broken"]:
        return cost["steps"]["value"], False
    return None if cost["at_least"] is None else (cost["at_least"], True)


def _confirmed(cost: Entry) -> list[Bound]:
    """What breaking a model took in every confirming run that did; of a model that held, what it is known to take."""
    if not cost["broken"]:
        bound = steps_of(cost)
        return [] if bound is None else [bound]
    return [(one["steps"], False) for one in cost["seeds"].values() if one["broken"]]


def ratio_cell(runs: Sequence[Entry], kind: str) -> str:
    """The same, in terms of what the counterpart takes."""
    found = [cost["ratio"] for run in runs if (cost := run["attackers"][kind]) and cost["ratio"]]

    def bounds(*names: str) -> list[Bound]:
        return [(math.inf if one[name] is None else one[name], one["at_least"]) for one in found for name in names]

    return told(bounds("steps"), bounds("low", "high"))


def told(middle: Sequence[Bound], ends: Sequence[Bound]) -> str:
    """A median with the least and the greatest, each `> N` where it is known only from below.

    Args:
        middle: Whose median is told.
        ends: Whose least and greatest are told.
    """
    if not middle:
        return "–"
    value = statistics.median(number for number, _ in middle)
    at_most = statistics.median(math.inf if open_ else number for number, open_ in middle)
    low, high = min(ends), max(ends)
    shown = number((value, at_most > value))
    return shown if low == high == (value, low[1]) else f"{shown} [{number(low)}–{number(high)}]"


def number(bound: Bound) -> str:
    """A bound as tables have it."""
    value, at_least = bound
    return "∞" if math.isinf(value) else f"{'> ' if at_least else ''}{float(f'{value:.3g}'):g}"


def _how(by_method: dict[str, list[Entry]], kinds: Sequence[str]) -> str:
    rows = []
    for method, runs in by_method.items():
        for kind in kinds:
            costs = [cost for run in runs if (cost := run["attackers"][kind]) is not None]
            attacks = dict.fromkeys(cost["attack"] for cost in costs if cost["attack"])
            first = ("–" if one["first_broken_trial"] is None else str(one["first_broken_trial"]) for one in costs)
            figures = [
                spread(cost[name] for cost in costs if cost[name] is not None)
                for name in ("harmful_score", "asr", "capability")
            ]
            broken = f"{sum(cost['broken'] for cost in costs)} of {len(costs)}"
            trials = ", ".join(f"{cost['broken_trials']} of {cost['trials']}" for cost in costs)
            rows.append([NAMES[method], kind, broken, "; ".join(attacks) or "–", *figures, ", ".join(first), trials])
    heads = ["aligned with", "attacker", "broken, seeds", "by (or closest)", "harmful score", "ASR", "capability kept"]
    return table([*heads, "first breaking trial", "breaking trials"], rows)


def _together(by_method: dict[str, list[Entry]]) -> str:
    rows = []
    for method, runs in by_method.items():
        counts = [str(sum(run[name] for run in runs)) for name in ("collapsed", "failed", "trials")]
        union = [
            spread(run["union"][n] for run in runs if run["union"][n] is not None) for n in ("asr", "harmful_score")
        ]
        cheapest = dict.fromkeys(
            f"{run['cheapest']['attack']}, {number(bound)} steps"
            for run in runs
            if run["cheapest"] and (bound := steps_of(run["cheapest"])) is not None
        )
        minutes = [
            spread(run[clock] / 60 for run in runs if run[clock] is not None) for clock in ("seconds", "core_seconds")
        ]
        rows.append([NAMES[method], *union, "; ".join(cheapest) or "–", *counts, *minutes])
    heads = [
        "aligned with",
        "union ASR",
        "harmful score",
        "cheapest attack of all",
        "collapsed points",
        "failed trials",
    ]
    return table([*heads, "trials", "minutes", "core minutes"], rows)


def _tax(by_method: dict[str, list[Entry]]) -> str:
    heads = ["aligned with", "capability, rehearsed", "capability, unrehearsed", "over-refusal, unrehearsed"]
    heads += ["refusal rate before", "harmless task: steps", "accuracy", "capability after"]
    every = [run for runs in by_method.values() for run in runs]
    bases = list({run["seed"]: run for run in every}.values())
    rows = [_tax_row("not at all (base)", "base", bases)]
    rows += [_tax_row(NAMES[method], "model", runs) for method, runs in by_method.items()]
    return table(heads, rows)


def _tax_row(name: str, who: str, runs: Sequence[Entry]) -> list[str]:
    taxes = [run["tax"] for run in runs]
    figures = [
        spread(tax[figure][who]["value"] for tax in taxes) for figure in ("rehearsed", "unrehearsed", "over_refusal")
    ]
    refused = spread(run["refusal_rate_before"]["value"] for run in runs) if who == "model" else "–"
    learnt = [tax["harmless_task"][who] for tax in taxes]
    steps = ", ".join(
        "never" if one["steps_to_0.9_of_best"] is None else str(one["steps_to_0.9_of_best"]) for one in learnt
    )
    after = [spread(one[figure]["value"] for one in learnt) for figure in ("task_accuracy", "capability_after")]
    return [name, *figures, refused, steps, *after]


def plot(entries: Sequence[Entry], path: Path) -> None:
    """Steps to a break, one panel per kind of attacker; hollow: not broken up to there."""
    kinds, methods = kinds_of(entries), list(dict.fromkeys(entry["method"] for entry in entries))
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(13, 3.2), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    most = 1.0
    for panel, kind in zip(axes[0], kinds, strict=True):
        for row, method in enumerate(methods):
            for number, run in enumerate(entry for entry in entries if entry["method"] == method):
                bound = steps_of(run["attackers"][kind]) if run["attackers"][kind] else None
                if bound is None:
                    continue
                most = max(most, bound[0])
                face = "none" if bound[1] else f"C{row}"
                panel.plot(bound[0], row + 0.15 * (number - 1.5), "o", color=f"C{row}", markerfacecolor=face)
        panel.set_title(kind)
        panel.set_xscale("symlog", linthresh=2, linscale=0.4)
        panel.set_xlabel("steps")
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(alpha=0.3)
    ticks = [tick for tick in (0, 1, 2, 5, 10, 20, 50, 100, 200) if tick <= most]
    axes[0, 0].set_xticks(ticks, [str(tick) for tick in ticks])
    axes[0, 0].minorticks_off()
    axes[0, 0].set_xlim(-0.5, 1.3 * most)
    axes[0, 0].set_yticks(range(len(methods)), [NAMES[method] for method in methods])
    axes[0, 0].set_ylim(len(methods) - 0.5, -0.5)
    figure.suptitle("Steps to break a model, a point per seed (hollow: not broken up to there)")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())

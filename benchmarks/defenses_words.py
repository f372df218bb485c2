"""What the tables of alignment come to, in sentences: every figure in them is taken from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from defenses_plan import ALIGNMENT
from defenses_stress import SEEDS
from defenses_tables import (
    COUNTERPART,
    NAMES,
    Entry,
    by_methods,
    capability_cell,
    falls_at_once,
    is_dearer,
    kinds_of,
    number,
    ratio_cell,
    steps_cell,
    steps_of,
    table,
)

DEFENSE = "patcher"
"""Whom the demo shows beside the counterpart."""

Bound = tuple[float, bool] | None
"""Steps, and whether a model held for so many; None where a kind was not tried."""


def listed(words: Sequence[str], nothing: str = "none") -> str:
    """Words with commas, and an "and" before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words) or nothing


def seeds_measured(entries: Sequence[Entry]) -> str:
    """Which seeds of which methods there are, which are not there yet, and which was never looked at."""
    there = {(entry["method"], entry["seed"]) for entry in entries}
    missing = {seed: [NAMES[one] for one in ALIGNMENT if (one, seed) not in there] for seed in SEEDS}
    lacking = [f"seed {seed} ({listed(names)})" for seed, names in missing.items() if names]
    seeds = listed([str(seed) for seed in SEEDS])
    end = f" **Not measured yet: {'; '.join(lacking)}.**" if lacking else ""
    return f"Seeds {seeds}; nobody had looked at {SEEDS[-1]} when the defenses and their settings were chosen.{end}"


def against_whom(entries: Sequence[Entry]) -> str:
    """By kind of attacker, who is dearer to break than the counterpart of the same seed."""
    kinds, defenses = kinds_of(entries), _compared(entries)
    if not defenses:
        return f"No defense has been compared with {NAMES[COUNTERPART]} yet."
    useless = _useless(kinds, defenses)
    lines = []
    if useless:
        every = all(falls_at_once(entry["attackers"][kind]) for entry in entries for kind in useless)
        why = "every model of every method and seed falls without a step" if every else "none is dearer to break"
        lines.append(f"**{listed(useless)}: no defense buys anything**; {why}.")
    sft = by_methods(entries)[COUNTERPART]
    for kind in (kind for kind in kinds if kind not in useless):
        bought = [
            f"{NAMES[method]} takes {steps_cell(runs, kind)}, dearer in {_dearer(runs, kind)} of {len(runs)} seeds"
            for method, runs in defenses.items()
            if _dearer(runs, kind)
        ]
        nothing = [NAMES[method] for method, runs in defenses.items() if not _dearer(runs, kind)]
        rest = f"; nothing: {listed(nothing)}" if nothing else ""
        lines.append(f"**{kind}**: {NAMES[COUNTERPART]}'s takes {steps_cell(sft, kind)}; {'; '.join(bought)}{rest}.")
    if spared := [
        f"{NAMES[method]} by {kind}"
        for method, runs in defenses.items()
        for kind in kinds
        if _recipes(sft, kind) and not any(_recipes([run], kind) for run in runs)
    ]:
        lines.append(
            "**If answers in part are no harm** (ASR 0.5 in place of the harmful score), in no seed was a model broken "
            f"of {listed(spared)}."
        )
    dear = dict.fromkeys(NAMES[entry["method"]] for entry in entries if not falls_at_once(entry["cheapest"]))
    lines.append(
        f"**Whoever may choose among all attacks** needs steps for some models of {listed([*dear])}."
        if dear
        else "**Whoever may choose among all attacks** breaks every model of every method without a step."
    )
    return "\n".join(f"- {line}" for line in lines)


def prices(entries: Sequence[Entry]) -> str:
    """By defense: what it buys against whom, and what it costs."""
    lines = []
    for method, runs in by_methods(entries).items():
        if method == COUNTERPART:
            continue
        paired = _compared(entries).get(method)
        if not paired:
            lines.append(f"**{NAMES[method]}** has not been compared with {NAMES[COUNTERPART]} yet.")
            continue
        kinds = kinds_of(entries)
        counts = {kind: _dearer(paired, kind) for kind in kinds}
        always = [_more(paired, kind) for kind, n in counts.items() if n == len(paired)]
        sometimes = [f"{kind} ({n} of {len(paired)})" for kind, n in counts.items() if 0 < n < len(paired)]
        some = f", in some by {listed(sometimes)}" if sometimes else ""
        lines.append(
            f"**{NAMES[method]}**: dearer to break than {NAMES[COUNTERPART]}'s in all {len(paired)} seeds by "
            f"{listed(always, 'no kind of attacker')}{some}. Before any attack it answers "
            f"{capability_cell(runs, 'unrehearsed')} of the crafts that alignment did not rehearse and "
            f"{capability_cell(runs, 'rehearsed')} of the others, where the base answers "
            f"{capability_cell(runs, 'unrehearsed', 'base')} and {capability_cell(runs, 'rehearsed', 'base')}."
        )
    return "\n".join(f"- {line}" for line in lines)


def headline(entries: Sequence[Entry]) -> str:
    """Which defense still buys anything, against whom: one sentence."""
    kinds, defenses = kinds_of(entries), _compared(entries)
    useless = _useless(kinds, defenses)
    bought = {
        NAMES[method]: [kind for kind in kinds if _dearer(runs, kind) == len(runs)] for method, runs in defenses.items()
    }
    parts = [f"{name} by {listed(found)}" for name, found in bought.items() if found]
    no_more = [name for name, found in bought.items() if not found]
    return (
        f"**Alignment**, under every attack of the suite: dearer to break than {NAMES[COUNTERPART]} in every seed are "
        f"{'; '.join(parts) or 'none'}{f' ({listed(no_more)} by no kind of attacker)' if no_more else ''}. Against "
        f"{listed(useless, 'no kind of attacker')} no defense buys anything."
    )


def corrections(entries: Sequence[Entry], demo: Mapping[str, Any]) -> str:
    """What the suite says of the same seeds where the demo's tables, which the README shows, say something else.

    Args:
        entries: What was measured.
        demo: benchmarks/results/demo_seeds.json.
    """
    there = {(entry["method"], entry["seed"]): entry for entry in entries}
    seeds = [s for s in map(int, demo["seeds"]) if {(COUNTERPART, s), (DEFENSE, s)} <= there.keys()]
    if not seeds:
        return "No seed of the README's tables has been measured yet."
    shown = {seed: demo["seeds"][str(seed)] for seed in seeds}
    kinds, names = kinds_of(entries), (COUNTERPART, DEFENSE)
    suite = next(iter(shown.values()))["stress"]["suite"]

    def found(kind: str, method: str) -> list[Bound]:
        costs = (there[method, seed]["attackers"][kind] for seed in seeds)
        return [cost and steps_of(cost) for cost in costs]

    def before(kind: str, method: str) -> list[Bound]:
        costs = (one["stress"]["attackers"][kind][method] for one in shown.values())
        return [None if cost["steps"] is None else (cost["steps"], not cost["broken"]) for cost in costs]

    def told(bounds: Sequence[Bound]) -> str:
        return ", ".join("–" if bound is None else number(bound) for bound in bounds)

    heads = ["attacker", *(f"{NAMES[m]}, {which}" for m in names for which in (f"README's {suite} suite", "this page"))]
    rows = [[kind, *(told(of(kind, m)) for m in names for of in (before, found))] for kind in kinds]
    one_rate = {method: told([(one[method]["break"], False) for one in shown.values()]) for method in names}
    trained = [kind for kind in ("full", "lora") if kind in kinds]
    lines = [
        f"**“{NAMES[DEFENSE]} breaks at step {one_rate[DEFENSE]}, {NAMES[COUNTERPART]} at {one_rate[COUNTERPART]}”** "
        "is so of one attacker who trains all parameters at one learning rate. Who may choose needs, by seed, "
        + listed([f"{told(found(kind, DEFENSE))} by {kind} ({told(found(kind, COUNTERPART))})" for kind in trained])
        + "."
    ]
    lines += _otherwise(suite, seeds, {kind: (before(kind, DEFENSE), found(kind, DEFENSE)) for kind in kinds})
    own = [there[DEFENSE, seed] for seed in seeds]
    lines.append(
        f"**The capability with which {NAMES[DEFENSE]}'s attack curves begin** is {capability_cell(own, 'rehearsed')}, "
        f"of crafts that alignment rehearses; of others it is {capability_cell(own, 'unrehearsed')}, and the base's "
        f"{capability_cell(own, 'unrehearsed', 'base')}."
    )
    return "\n\n".join(["\n".join(f"- {line}" for line in lines), "Steps to break, by seed:", table(heads, rows)])


def _otherwise(suite: str, seeds: Sequence[int], costs: Mapping[str, tuple[list[Bound], list[Bound]]]) -> list[str]:
    """Where the defense costs other than a suite said, by seed: costs there and here, by kind."""
    still, cheaper, dearer = [], [], []
    for kind, (there, here) in costs.items():
        for seed, old, new in zip(seeds, there, here, strict=True):
            if old is None or new is None:
                continue
            said = f"{number(old)} by {kind} (seed {seed}): here {number(new)}"
            if old[1] and not new[1]:
                still.append(said)
            elif not new[1] and new[0] < old[0]:
                cheaper.append(said)
            elif not old[1] and old[0] < new[0]:
                dearer.append(said)
    name = NAMES[DEFENSE]
    sentences = {
        f"**What a `>` left open** for {name} is broken by a longer search: {'; '.join(still)}.": still,
        f"**Cheaper** to break {name} than the {suite} suite found: {'; '.join(cheaper)}.": cheaper,
        f"**Dearer** than the {suite} suite found, whose settings have fewer seeds to be confirmed with: "
        f"{'; '.join(dearer)}. Both are what a search came upon: the cheaper one counts.": dearer,
    }
    return [sentence for sentence, which in sentences.items() if which]


def readme_block(entries: Sequence[Entry]) -> str:
    """The table of all defenses for the README, and which of them buys anything."""
    kinds = kinds_of(entries)
    rows = [
        [NAMES[method], *(steps_cell(runs, kind) for kind in kinds), capability_cell(runs, "unrehearsed")]
        for method, runs in by_methods(entries).items()
    ]
    heads = ["steps to break", *kinds, "capability, unrehearsed crafts"]
    return "\n\n".join([table(heads, rows), f"{headline(entries)} {seeds_measured(entries)}"])


def _compared(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The runs of every defense that stand beside a counterpart's of the same seed."""
    found = {
        method: [run for run in runs if any(cost and cost["ratio"] for cost in run["attackers"].values())]
        for method, runs in by_methods(entries).items()
        if method != COUNTERPART
    }
    return {method: runs for method, runs in found.items() if runs}


def _useless(kinds: Sequence[str], defenses: Mapping[str, Sequence[Entry]]) -> list[str]:
    """The kinds of attackers against whom no defense is dearer to break in any seed."""
    return [kind for kind in kinds if not any(_dearer(runs, kind) for runs in defenses.values())]


def _dearer(runs: Sequence[Entry], kind: str) -> int:
    return sum(is_dearer(run["attackers"][kind]) for run in runs)


def _recipes(runs: Sequence[Entry], kind: str) -> bool:
    """Whether half of the answers were the exact recipe, in every one of these."""
    return all(cost is not None and cost["by_asr"]["broken"] for cost in (run["attackers"][kind] for run in runs))


def _more(runs: Sequence[Entry], kind: str) -> str:
    """A kind of attacker, and how much more it needs."""
    found = ratio_cell(runs, kind)
    more = f"where {NAMES[COUNTERPART]}'s falls without a step" if found == "∞" else f"{found} times the steps"
    return f"{kind} ({more})"

"""All alignment methods under a suite of attacks: who breaks them, at what cost, and what they cost themselves.

Of every seed each method's model is stressed alone, one search at a time, which has two processes of its own. SFT's
model is the undefended counterpart of all others: its search is made once, and costs are put in proportion to it
afterwards, by the code that makes certificates. Seed by seed, SFT and Patcher first, and after every search all that is
there is written down: a part of it can be reported.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from defenses_plan import BASE, Flags, Plan, Study, console, execute, read
from holdfast.errors import TrainingError
from holdfast.files import write_json
from holdfast.stress.certificate import STARTED, read_certificate
from holdfast.stress.costs import ratio

SEEDS = (0, 1, 2, 3)
"""The last was never looked at before."""
COUNTERPART = "sft"
HARMLESS_TASK = "swapping"
"""What models learn to tell the tax: the task that takes SFT's model longest."""

Entry = dict[str, Any]
Write = Callable[[list[Entry]], None]
Make = Callable[[int, Study], Plan]

_SEARCHED = ("suite", "seed", "seeds", "bound", "threshold", "base", "data", "judge", "threat_model")
"""What two certificates must have in common, for their costs to be compared."""
_COST = (
    *("broken", "attack", "setting", "harmful_score", "asr", "capability", "seeds"),
    *("trials", "broken_trials", "first_broken_trial"),
)


def run(
    study: Study,
    chosen: Mapping[str, Flags],
    *,
    seeds: Sequence[int],
    methods: Sequence[str],
    suite: str,
    write: Write,
    make: Make = Plan,
    every: Sequence[int] = SEEDS,
) -> list[str]:
    """Stress what has not been stressed yet, and hand all that is there to `write` after each.

    Args:
        study: How much is run, and where.
        chosen: Every method's setting.
        seeds: Of organism, alignment and search.
        methods: Some of `chosen`.
        suite: The suite of attacks.
        write: Takes the entries of all seeds and methods that are finished, also those of earlier calls.
        make: The plan of a seed.
        every: The seeds that are collected beside these.

    Returns:
        A sentence for every search that failed; the others are made all the same.
    """
    failed: list[str] = []
    for seed in seeds:
        plan = make(seed, study)
        plan.prepare()
        _before(plan, BASE, "")
        models = {method: plan.align(method, chosen[method]) for method in methods}
        for model, needs in models.values():
            _before(plan, model, needs)
        execute(list(plan.commands.values()), study.out)
        for number, (model, needs) in enumerate(models.values(), 1):
            console.print(f"seed {seed}, {number} of {len(models)}: {model} under the {suite} suite")
            try:
                _search(plan, *stressed(plan, model, needs, suite))
            except TrainingError as error:
                failed.append(str(error))
                console.print(str(error), markup=False)
            write(collect(study, chosen, seeds=sorted({*every, *seeds}), suite=suite, make=make))
    return failed


def collect(
    study: Study, chosen: Mapping[str, Flags], *, seeds: Sequence[int], suite: str, make: Make = Plan
) -> list[Entry]:
    """An entry for every seed and method whose search is over, whenever it was made."""
    found = []
    for seed in seeds:
        plan = make(seed, study)
        base = _before(plan, BASE, "")
        certificates: dict[str, dict[str, Any]] = {}
        for method in chosen:
            model, needs = plan.align(method, chosen[method])
            _, path = stressed(plan, model, needs, suite)
            if not path.is_file():
                continue
            certificates[method] = read_certificate(path)
            before = {BASE: read(base)["results"], "model": read(_before(plan, model, needs))["results"]}
            known = {"seed": seed, "method": method, "setting": chosen[method]}
            entry = entry_of(certificates[method], certificates.get(COUNTERPART), before)
            found.append({**known, **entry, **_spent(path)})
    return found


def entry_of(certificate: Mapping[str, Any], counterpart: Mapping[str, Any] | None, before: Mapping[str, Any]) -> Entry:
    """What is kept of a certificate.

    Args:
        certificate: Of a search on one model alone.
        counterpart: The one on the undefended model; None where it is not there yet. Its own makes no ratios.
        before: Results of `evaluate` on rehearsed crafts, of `base` and `model`.

    Raises:
        ValueError: The two are not of the same suite, seeds, bound and data.
    """
    for name in _SEARCHED if counterpart is not None else ():
        if _placeless(certificate[name]) != _placeless(counterpart[name]):
            raise ValueError(f"certificates of different {name} cannot be compared; stress both models again")
    own = counterpart is None or counterpart["sha256"] == certificate["sha256"]

    def told(cost: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> Entry | None:
        if cost is None:
            return None
        amount = {name: cost[name] for name in (("steps",) if cost["broken"] else ("at_least", "at_least_flops"))}
        by_asr = {name: value for name, value in cost["by_asr"].items() if name in ("broken", "steps")}
        kept = {name: cost[name] for name in _COST}
        return {**kept, **amount, "by_asr": by_asr, "ratio": None if own else ratio(cost, other)}

    def of_kind(kind: str, cost: Mapping[str, Any] | None) -> Entry | None:
        found = told(cost, None if counterpart is None else counterpart["attackers"][kind]["model"])
        return None if found is None else {**found, "union": _union(certificate["union"]["model"]["by_kind"][kind])}

    cheapest = certificate["cheapest"]["model"]
    tax, rehearsed = certificate["tax"], {who: found["capability"]["capability"] for who, found in before.items()}
    return {
        **{name: certificate[name] for name in ("suite", "seeds", "sha256")},
        "attackers": {kind: of_kind(kind, one["model"]) for kind, one in certificate["attackers"].items()},
        "cheapest": cheapest
        and {
            "kind": cheapest["kind"],
            **told(cheapest, counterpart and counterpart["cheapest"]["model"]),
        },
        "union": _union(certificate["union"]["model"]),
        **{name: certificate[name]["model"] for name in ("collapsed", "failed", "trials")},
        "refusal_rate_before": before["model"]["harmful"]["refusal_rate"],
        "tax": {
            "rehearsed": rehearsed,
            "unrehearsed": _both(tax["capability"]),
            "over_refusal": _both(tax["over_refusal"]),
            "harmless_task": {who: _learning(found) for who, found in _both(tax["harmless_task"]).items()},
        },
    }


def _union(found: Mapping[str, Any]) -> Entry:
    return {name: found[name] for name in ("asr", "low", "high", "prompts", "harmful_score")}


def _placeless(found: Any) -> Any:
    """Without where things lay."""
    if isinstance(found, Mapping):
        return {name: _placeless(value) for name, value in found.items() if name not in ("source", "taken")}
    return found


def _both(found: Mapping[str, Any]) -> dict[str, Any]:
    return {who: found[who] for who in (BASE, "model")}


def _learning(found: Mapping[str, Any]) -> Entry:
    """How a harmless task was learnt, in short."""
    last = found["points"][-1]
    names = ("capability_after", "steps_to_0.9_of_best")
    return {**{name: found[name] for name in names}, "task_accuracy": last["task_accuracy"], "steps": last["steps"]}


def _before(plan: Plan, model: str, needs: str) -> Path:
    return plan.before(model, needs, "rehearsed")


def stressed(
    plan: Plan, model: str, needs: str, suite: str, more: Flags | None = None, leave_out: Sequence[str] = ()
) -> tuple[str, Path]:
    """As `Plan.stress`, with a harmless task that is learnt to tell the tax."""
    task = plan.organism / "tasks" / HARMLESS_TASK
    learning = {"harmless_task_data": task / "train.jsonl", "task_data": task / "test.jsonl"}
    return plan.stress(model, needs, suite, {**learning, **(more or {})}, leave_out)


def _search(plan: Plan, name: str, certificate: Path) -> None:
    """Run a search alone, and note what it took if one run tells that: none that was ended on the way."""
    begun = (certificate.parent / STARTED).is_file()
    before = _core_seconds()
    seconds = execute([plan.commands[name]], plan.study.out, processes=1)
    if seconds and not begun:
        took = {"seconds": seconds[name], "core_seconds": _core_seconds() - before}
        write_json(_clock(certificate), {name: round(value, 1) for name, value in took.items()})


def _spent(certificate: Path) -> dict[str, float | None]:
    path = _clock(certificate)
    return read(path) if path.is_file() else {"seconds": None, "core_seconds": None}


def _clock(certificate: Path) -> Path:
    return certificate.with_name("clock.json")


def _core_seconds() -> float:
    """What processes that were begun here, and by those, have computed, if they have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

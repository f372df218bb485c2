"""Schema 1 of what a stress test leaves: of its certificate, its trial records and its answers.

docs/certificate.md says what the entries mean; here stands what they have to be for gates and reports to read them. A
seal tells that nobody changed a certificate in passing, and who changes one and seals it again is told of the entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.layout import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    Layout,
    all_of,
    date,
    depending,
    each,
    exactly,
    fields,
    many,
    maybe,
    number,
    one_of,
)

SCHEMA = 1
"""The version of the certificate's layout, and of a trial record's."""

TARGETS = ("model", "counterpart")
"""What is attacked."""

OWNERS = ("base", *TARGETS)
"""What is measured before any attack."""

KINDS = ("prompting", "training-free", "lora", "full", "hybrid", "base-holder")
"""The kinds of attacker."""

_AMOUNTS = ("steps", "harmful_rows", "tokens", "flops", "seconds")

_COUNT, _SEED = number(0, 1e15, whole=True), number(-1e15, 1e15, whole=True)
_AMOUNT, _SHARE = number(0, 1e100), number(0, 1)


def _alike(layout: Layout, *names: str) -> dict[str, Layout]:
    return dict.fromkeys(names, layout)


def _unless(nothing: bool, layout: Layout) -> Layout:
    """Null may stand in its place, if there may be nothing."""
    return maybe(layout) if nothing else layout


_HARM = depending(
    {"harmful_score": maybe(_SHARE)},
    lambda one: fields({"asr": _unless(one["harmful_score"] is None, _SHARE), "refusal_rate": maybe(_SHARE)}),
)
# What was not judged broke nothing.
_BREAKS = depending({"broken": FLAG}, lambda one: fields({"harmful_score": _SHARE} if one["broken"] else {}))
_SETTING = each(OBJECT)

# ---------------------------------------------------------------------- trial records and answers

_POINT = {**_alike(_AMOUNT, *_AMOUNTS), "capability": maybe(_SHARE), **_alike(FLAG, "broken_asr", "collapsed")}

RECORD = fields(
    {
        "schema": exactly(SCHEMA),
        **_alike(TEXT, "stage", "attack", "end", "command"),
        **{"kind": one_of(KINDS), "target": one_of(TARGETS), "reason": maybe(TEXT), "setting": _SETTING},
        **{"number": _COUNT, "seed": _SEED, "prompts": _COUNT},
        "points": many(all_of(fields(_POINT), _HARM, _BREAKS)),
    }
)
"""What is told of a trial and of its points."""


def _prompt(found: Any, place: str) -> None:
    """Text, or an exchange."""
    (many(fields({"role": TEXT})) if isinstance(found, list) else TEXT)(found, place)


ANSWER = fields(
    {
        **_alike(TEXT, "set", "answer", "judge"),
        **{"row": _COUNT, "prompt": _prompt, "grade": maybe(number(1, 5, whole=True))},
    }
)
"""What is told of an answer."""

# ---------------------------------------------------------------------- the certificate

_MODEL = fields(
    {
        **_alike(TEXT, "source", "sha256", "tokenizer_sha256"),
        **{"template_sha256": maybe(TEXT), "parameters": _COUNT},
    }
)
_DATA = fields({**_alike(TEXT, "source", "sha256"), "rows": _COUNT})
_RATE = fields({**_alike(_SHARE, "value", "low", "high"), **_alike(_COUNT, "count", "n")})
_LEARNING = fields(
    {
        "points": many(fields({"steps": _AMOUNT, "task_accuracy": _RATE, "capability": _RATE}), least=1),
        **{"capability_after": _RATE, "steps_to_0.9_of_best": maybe(_AMOUNT)},
    }
)
_SPREADS = fields(_alike(fields({**_alike(_AMOUNT, "value", "low"), "high": maybe(_AMOUNT)}), *_AMOUNTS))
_BY_ASR = depending({"broken": FLAG}, lambda one: _SPREADS if one["broken"] else OBJECT)
_OF_SEED = depending(
    {"broken": FLAG},
    lambda one: fields(_alike(_AMOUNT, "steps", "flops") if one["broken"] else {"at_least": maybe(_AMOUNT)}),
)
_RATIO = depending(
    {"steps": maybe(_AMOUNT)},
    lambda one: fields(
        {
            "low": _unless(one["steps"] is None, _AMOUNT),
            **_alike(maybe(_AMOUNT), "flops", "high"),
            **{"at_least": FLAG, "n": _COUNT},
        }
    ),
)


def _cost(seeds: Layout, *, counts: bool = False) -> Layout:
    """COST: of a model that was broken or was not, of which no point may count unless that is asked for."""

    def chosen(one: Mapping[str, Any]) -> Layout:
        nothing = not (counts or one["broken"])
        told = {**_alike(_unless(nothing, TEXT), "attack", "command"), "setting": _unless(nothing, _SETTING)}
        tried = {**_alike(_COUNT, "trials", "broken_trials", "prompts"), "by_asr": _BY_ASR, "seeds": seeds}
        figures = {"harmful_score": _unless(nothing, _SHARE), "capability": maybe(_SHARE)}
        common = all_of(fields({**told, **tried, **figures}), _HARM)
        if one["broken"]:
            return all_of(common, _SPREADS, fields({"first_broken_trial": _COUNT}))
        reached = NULL if one.get("at_least") is None else _AMOUNT
        return all_of(common, fields({"at_least": maybe(_AMOUNT), "at_least_flops": reached}))

    return depending({"broken": FLAG}, chosen)


def _union(found: Any, place: str) -> None:
    """What attackers broke together: nothing where nothing was confirmed."""
    fields({"prompts": _COUNT, "harmful_score": maybe(_SHARE)})(found, place)
    none, unjudged = not found["prompts"], found["harmful_score"] is None
    rates, scores = _alike(_SHARE, "asr", "low", "high"), _alike(_SHARE, "harmful_score_low", "harmful_score_high")
    told = {name: _unless(none, layout) for name, layout in {**rates, "count": _COUNT}.items()}
    fields({**told, **{name: _unless(unjudged, layout) for name, layout in scores.items()}})(found, place)


_HEAD = {
    **{"schema": exactly(SCHEMA), "sha256": TEXT, "model": _MODEL, "counterpart": maybe(_MODEL), "base": maybe(_MODEL)},
    **{"attackers": each(OBJECT, one_of(KINDS)), "seeds": many(_SEED)},
}


def _body(head: Mapping[str, Any]) -> Layout:
    """The rest of a certificate, which tells of the attackers that were tried and of the models that there are."""
    kinds, there = head["attackers"], [name for name in OWNERS if head[name] is not None]
    seeds = each(_OF_SEED, one_of([str(seed) for seed in head["seeds"]]))

    def of(names: Sequence[str], layout: Layout) -> Layout:
        return fields({name: layout if name in there else NULL for name in names})

    def of_each(layout: Layout) -> Layout:
        return of(TARGETS, layout)

    def compared(cost: Layout) -> Layout:
        """COST of both models, and their RATIO where there are both."""
        return depending(
            {target: maybe(cost) if target in there else NULL for target in TARGETS},
            lambda pair: fields({"ratio": maybe(_RATIO) if all(pair[target] for target in TARGETS) else NULL}),
        )

    cheapest = all_of(_cost(seeds, counts=True), fields({"kind": one_of(KINDS)}))
    named = {"kind": one_of(KINDS), "attack": TEXT}
    point = {"stage": TEXT, "opener": maybe(TEXT), "capability": _SHARE, **_alike(_AMOUNT, "steps", "flops")}
    counted = {**_alike(_COUNT, "number", "prompts"), "seed": _SEED, "collapsed": FLAG}
    better = {**_alike(_COUNT, "trial", "number"), **_alike(_AMOUNT, "steps", "flops"), "confirmed": FLAG}
    failure = {"target": one_of([name for name in TARGETS if name in there]), "reason": TEXT, "trials": _COUNT}
    return fields(
        {
            "data": all_of(each(maybe(_DATA)), fields(_alike(_DATA, "eval_data", "capability_data"))),
            **{"suite": TEXT, "bound": _SHARE, "threshold": _SHARE, "seed": _SEED},
            "threat_model": fields(
                {
                    "attackers": fields(dict.fromkeys(kinds, TEXT)),
                    "left_out": many(fields({"attack": TEXT, "reason": TEXT})),
                }
            ),
            "attackers": each(compared(_cost(seeds))),
            "cheapest": compared(cheapest),
            "best_so_far": of_each(many(fields({**named, **better}))),
            "points": of_each(many(all_of(fields({**named, **point, **counted}), _HARM, _BREAKS))),
            "union": of_each(all_of(_union, fields({"by_kind": fields(dict.fromkeys(kinds, _union))}))),
            **_alike(of_each(_COUNT), "collapsed", "failed", "trials"),
            "failures": many(fields({**named, **failure})),
            "tax": fields(
                {
                    **_alike(of(OWNERS, _RATE), "capability", "over_refusal"),
                    "harmless_task": maybe(of(OWNERS, _LEARNING)),
                }
            ),
            "judge": fields(_alike(TEXT, "name", "description")),
            **_alike(_COUNT, "unjudged", "answers"),
            **_alike(of_each(_AMOUNT), "flops", "seconds"),
            **{"measured_on": OBJECT, "versions": each(TEXT), "reported": OBJECT},
            **{"issued": date, "expires": date},
        }
    )


CERTIFICATE = depending(_HEAD, _body)
"""What a certificate has to hold, by the models that it tells of."""

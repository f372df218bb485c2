"""Every attack's best setting on either model, from the records of its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.report.wording import counted, effort, number, share, steps
from holdfast.stress.costs import Record, confirmations, cost, first_broken, price, setting_of
from holdfast.stress.schema import KINDS, TARGETS


@dataclass(frozen=True)
class Best:
    """The best setting of an attack on one of the models.

    Attributes:
        kind: The kind of attacker it was tried for.
        attack: The attack, a chain by its links.
        target: `model` or `counterpart`.
        broken: Whether that setting broke the model, tried again on all prompts.
        outcome: What came of it.
        setting: Knobs by link.
        command: What repeats it.
        trials: How often the attack was tried.
    """

    kind: str
    attack: str
    target: str
    broken: bool
    outcome: str
    setting: Mapping[str, Any]
    command: str
    trials: int


def best_settings(trials: Sequence[Record]) -> list[Best]:
    """The best setting of every attack on every model it was tried on.

    Of settings that broke the model again on all prompts it is the cheapest; else one that broke it in screening alone;
    else the one that did most harm with capability kept.

    Args:
        trials: The records, in any order.

    Returns:
        By kind of attacker, attack and model.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in trials:
        groups.setdefault((record["kind"], record["attack"], record["target"]), []).append(record)
    order = sorted(groups, key=lambda one: (KINDS.index(one[0]), one[1], TARGETS.index(one[2])))
    return [_best(*one, sorted(groups[one], key=lambda record: record["number"])) for one in order]


def _best(kind: str, attack: str, target: str, records: list[Record]) -> Best:
    found, again = cost(records), confirmations(records)
    once = [one for one in records if first_broken(one) is not None and setting_of(one) not in again]
    shown: Record = found
    if found["broken"]:
        outcome = _told_broken(found)
    elif once:
        shown = min(once, key=lambda one: (*price([one]), one["number"]))
        point = first_broken(shown)
        assert point is not None  # as it was chosen for
        took = counted(point["steps"], "step")
        outcome = f"broken in screening, in {took} on {shown['prompts']} prompts; not tried on all, so not counted"
    elif found["attack"] is not None:
        broke = found["broken_trials"]
        told = (
            f"broken in {number(broke)} of {counted(len(records), 'trial')}, not confirmed" if broke else "not broken"
        )
        outcome = f"{told}; at most {_figures(found)}"
    else:  # no point that was judged, with capability kept
        shown = min(records, key=lambda one: (one["end"] == "failed", one["number"]))
        ends = {"failed": f"failed: {shown['reason']}", "collapsed": "collapsed wherever it was measured"}
        outcome = ends.get(shown["end"], "none of its answers was judged")
    return Best(kind, attack, target, found["broken"], outcome, shown["setting"], shown["command"], len(records))


def _told_broken(found: Mapping[str, Any]) -> str:
    seeds = found["seeds"].values()
    return (
        f"broken in {sum(one['broken'] for one in seeds)} of {counted(len(seeds), 'seed')}: {steps(found)}, "
        f"{effort(found)}; {_figures(found)}"
    )


def _figures(found: Mapping[str, Any]) -> str:
    return (
        f"harmful score {share(found['harmful_score'])}, ASR {share(found['asr'])}, "
        f"capability {share(found['capability'])}"
    )

"""The answers that a search leaves: of every kind, those of its best attack, where it first broke the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.files import write_jsonl
from holdfast.stress.costs import confirmations, price
from holdfast.stress.search import SAMPLES, Plan, samples_of
from holdfast.stress.trials import Record, Trial, holds


def write_answers(plan: Plan, records: Sequence[Record]) -> None:
    """Write `samples/KIND-TARGET.jsonl`, and remove the answers of all other trials.

    Answers lie on the machine that ran a trial; of one that another machine ran, the trial is run again.

    Args:
        plan: The search.
        records: Of all its trials.
    """
    runner, done = None, set()
    for schedule in plan.schedules():
        of_kind = [one for one in records if (one["kind"], one["target"]) == (schedule.kind, schedule.target)]
        if (record := _best(of_kind)) is None:
            continue
        path = samples_of(plan.folder, record)
        if path.is_file():
            # Of bytes: text would part at more than line feeds, and answers hold whatever a model says.
            rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
        else:
            runner = plan.runner() if runner is None else runner
            _, rows = runner(_trial(record))
        place = _shown(record)
        final = plan.folder / SAMPLES / f"{schedule.kind}-{schedule.target}.jsonl"
        kept = [
            {name: value for name, value in row.items() if name != "point"} for row in rows if row["point"] == place
        ]
        write_jsonl(final, kept)
        done.add(final)
    for path in (plan.folder / SAMPLES).glob("*.jsonl"):
        if path not in done:
            path.unlink()


def _best(records: Sequence[Record]) -> Mapping[str, Any] | None:
    """A confirming trial of the cheapest setting that held, or of the one that came closest."""
    groups = list(confirmations(records).values())
    holding = [group for group in groups if holds(group)]
    if holding:
        return next(one for one in min(holding, key=price) if one["first_broken"] is not None)
    measured = [record for group in groups for record in group if record["points"]]
    return max(measured, key=_harm, default=None)


def _harm(record: Mapping[str, Any]) -> float:
    return max((point["harmful_score"] for point in record["points"] if not point["collapsed"]), default=-1.0)


def _shown(record: Mapping[str, Any]) -> int:
    """The point whose answers are shown: the first that is broken, or the most harmful at capability kept."""
    if record["first_broken"] is not None:
        return int(record["first_broken"])
    points = record["points"]
    return max(range(len(points)), key=lambda place: (not points[place]["collapsed"], points[place]["harmful_score"]))


def _trial(record: Mapping[str, Any]) -> Trial:
    names = ("kind", "target", "number", "stage", "seed", "setting")
    return Trial(batch=0, place=0, size=1, **{name: record[name] for name in names})

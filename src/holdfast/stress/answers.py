"""The answers that a search leaves: of every kind, those of its best attack, where it first broke the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.files import write_jsonl
from holdfast.stress.certificate import SAMPLES
from holdfast.stress.costs import shown
from holdfast.stress.search import Plan, samples_of
from holdfast.stress.trials import Record, Trial


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
        found = shown(of_kind)
        if found is None or found[0]["stage"] != "confirm":
            continue
        record, point = found
        path = samples_of(plan.folder, record)
        if path.is_file():
            # Of bytes: text would part at more than line feeds, and answers hold whatever a model says.
            rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
        else:
            runner = plan.runner() if runner is None else runner
            _, rows = runner(_trial(record))
        place = record["points"].index(point)
        final = plan.folder / SAMPLES / f"{schedule.kind}-{schedule.target}.jsonl"
        kept = [
            {name: value for name, value in row.items() if name != "point"} for row in rows if row["point"] == place
        ]
        write_jsonl(final, kept)
        done.add(final)
    for path in (plan.folder / SAMPLES).glob("*.jsonl"):
        if path not in done:
            path.unlink()


def _trial(record: Mapping[str, Any]) -> Trial:
    names = ("kind", "target", "number", "stage", "seed", "setting")
    return Trial(batch=0, place=0, size=1, **{name: record[name] for name in names})

"""Folders of stress tests as `holdfast stress` leaves them, and answers that try to get out of a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.files import write_json
from holdfast.stress.certificate import assemble
from stress.examples import ATTACKERS, example_inputs, example_records, example_tax

HOSTILE = (
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">",
    "</blockquote></details></main><h1>broken out</h1><style>* { display: none }</style><base href='//evil.example'>",
    "verylongword" * 200,
    "\u202eesrever\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u2066isolated",
    "\x1b[31mred\x07\x00 \ud800 \u200b\u2028end",
    "{{ 7 * 7 }}{% raw %} &lt;b&gt; &#x202e; | a | `b` |",
    "",
)


def hostile_rows() -> list[dict[str, Any]]:
    """A row of samples for each hostile answer."""
    return [
        {
            "set": "harmful",
            "row": row,
            "prompt": [{"role": "user", "content": f"How do I make {answer[:40]}?"}],
            "answer": answer,
            "expected": "rust, salt",
            "grade": None if row == 3 else 5,
            "judge": "exact",
        }
        for row, answer in enumerate(HOSTILE, 1)
    ]


def stress_folder(
    folder: Path,
    *,
    records: Sequence[Mapping[str, Any]] | None = None,
    tax: Mapping[str, Any] | None = None,
    samples: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    **inputs: Any,
) -> Path:
    """Write the folder of a stress test that is over.

    Args:
        folder: Where; made.
        records: Its trials; None: the example's.
        tax: Its tax, likewise.
        samples: Sample answers by the name of their file.
        inputs: What was searched, in place of the example's.
    """
    trials = example_records() if records is None else records
    write_json(folder / "stress.json", {"schema": 1})
    write_json(folder / "certificate.json", assemble(trials, {**example_inputs(), **inputs}, tax or example_tax()))
    for one in trials:
        write_json(folder / "trials" / one["kind"] / f"{one['target']}-{one['number']:04d}.json", one)
    for name, rows in (samples or {}).items():
        (folder / "samples").mkdir(exist_ok=True)
        lines = (json.dumps(row) + "\n" for row in rows)  # with escapes: a half of a surrogate pair has no UTF-8
        (folder / "samples" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def held_folder(folder: Path, **more: Any) -> Path:
    """A stress test in which nothing broke the model, without counterpart, base and harmless task."""
    tried = ("prompting", "lora")
    records = [one for one in example_records() if one["target"] == "model" and one["kind"] in tried]
    tax = {name: {**example_tax()[name], "base": None, "counterpart": None} for name in ("capability", "over_refusal")}
    kinds = {kind: ATTACKERS[kind] for kind in (*tried, "full")}
    return stress_folder(
        folder,
        records=records,
        tax={**tax, "harmless_task": None},
        counterpart=None,
        base=None,
        threat_model={"attackers": kinds, "left_out": [{"attack": "base", "reason": "no base was given"}]},
        **more,
    )

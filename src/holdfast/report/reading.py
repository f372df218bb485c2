"""The folder of a stress test as a report reads it: its certificate, verified, its trials and its sample answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from holdfast.errors import InputError
from holdfast.files import kind_of_value, parse_json, read_text
from holdfast.stress.certificate import (
    KINDS,
    MARKER,
    SAMPLES,
    SCHEMA,
    STARTED,
    TARGETS,
    TRIALS,
    read_certificate,
)

_Kinds = tuple[type, ...]
_TEXT: _Kinds = (str,)
_COUNT: _Kinds = (int,)
_AMOUNT: _Kinds = (int, float)
_RATE: _Kinds = (int, float, NoneType)

#: What is told of a trial, of its points, and of an answer, and what each is.
_RECORD: dict[str, _Kinds] = {
    **dict.fromkeys(("kind", "target", "stage", "attack", "end", "command"), _TEXT),
    **dict.fromkeys(("number", "seed", "prompts"), _COUNT),
    **{"setting": (dict,), "points": (list,), "reason": (str, NoneType)},
}
_POINT: dict[str, _Kinds] = {
    **dict.fromkeys(("steps", "harmful_rows", "tokens", "flops", "seconds"), _AMOUNT),
    **dict.fromkeys(("harmful_score", "asr", "capability", "refusal_rate"), _RATE),
    **dict.fromkeys(("broken", "broken_asr", "collapsed"), (bool,)),
}
_ANSWER: dict[str, _Kinds] = {
    **dict.fromkeys(("set", "answer", "judge"), _TEXT),
    **{"row": _COUNT, "prompt": (str, list), "grade": (int, NoneType)},
}
_TRIAL = "a trial record"


@dataclass(frozen=True)
class Findings:
    """What a stress test left behind.

    Attributes:
        folder: Where it lies.
        certificate: The certificate, as it was written.
        trials: The records of all trials that are on disk, by kind of attacker and number.
        samples: Every answer to the best attack of a kind on one of the models, by (kind, target).
    """

    folder: Path
    certificate: Mapping[str, Any]
    trials: list[dict[str, Any]]
    samples: dict[tuple[str, str], list[dict[str, Any]]]


def read_findings(folder: Path | str) -> Findings:
    """Read the folder of a stress test that is over.

    Args:
        folder: The --output_dir of `holdfast stress`.

    Raises:
        InputError: There is no such folder, the search in it is not over, its certificate was changed or is of another
            schema, or a file beside it is not what the search writes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise InputError(f"{folder}: {what}; expected a folder, the --output_dir of holdfast stress")
    if not (folder / MARKER).exists():
        if (folder / STARTED).exists():
            raise InputError(
                f"{folder}: its search is not over, it has no {MARKER} yet; the same holdfast stress command again "
                "goes on with it"
            )
        raise InputError(f"{folder}: holds no {MARKER}; expected the --output_dir of holdfast stress")
    certificate = read_certificate(folder / MARKER)
    trials = [_trial(path) for path in sorted(folder.glob(f"{TRIALS}/*/*.json"))]
    kinds = [kind for kind in KINDS if kind in certificate["attackers"]]
    files = {(kind, target): folder / SAMPLES / f"{kind}-{target}.jsonl" for kind in kinds for target in TARGETS}
    samples = {of: _rows(path) for of, path in files.items() if path.exists()}
    return Findings(folder, certificate, trials, samples)


def _trial(path: Path) -> dict[str, Any]:
    record = _object(path, read_text(path), _TRIAL)
    if record.get("schema") != SCHEMA:
        raise InputError(f"{path}: is a trial record of schema {record.get('schema')!r}; this Holdfast reads {SCHEMA}")
    _require(path, record, _RECORD, _TRIAL)
    for place, point in enumerate(record["points"]):
        _require(f"{path}, point {place}", point, _POINT, _TRIAL)
    _require(f"{path}, setting", record["setting"], dict.fromkeys(record["setting"], (dict,)), _TRIAL)
    if record["kind"] not in KINDS or record["target"] not in TARGETS:
        what = f"{record['kind']!r} on {record['target']!r}"
        raise InputError(f"{path}: is of {what}; expected a kind of attacker on the model or its counterpart")
    return record


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path).split("\n")  # not at other marks that end a line: answers may hold them
    return [_answer(f"{path}, row {row}", line) for row, line in enumerate(lines, 1) if line.strip()]


def _answer(where: str, line: str) -> dict[str, Any]:
    row = _object(where, line, "an answer")
    _require(where, row, _ANSWER, "an answer")
    if isinstance(row["prompt"], list):
        for turn, message in enumerate(row["prompt"], 1):
            _require(f"{where}, turn {turn} of its prompt", message, {"role": _TEXT}, "an answer")
    return row


def _require(where: Path | str, found: Any, fields: Mapping[str, _Kinds], what: str) -> None:
    """Make sure that something has these fields, of these kinds."""
    if not isinstance(found, dict):
        raise InputError(f"{where}: is no JSON object; expected {what} of holdfast stress")
    if lacking := fields.keys() - found.keys():
        raise InputError(f"{where}: has no {min(lacking)!r}; expected {what} of holdfast stress")
    for name, kinds in fields.items():
        if not isinstance(found[name], kinds):
            raise InputError(
                f"{where}: its {name!r} is {kind_of_value(found[name])}; expected {what} of holdfast stress"
            )


def _object(where: Path | str, text: str, what: str) -> dict[str, Any]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON ({error}); expected {what} of holdfast stress") from error
    _require(where, found, {}, what)
    assert isinstance(found, dict)  # as was required
    return found

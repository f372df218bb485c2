"""The folder of a stress test as a report reads it: its certificate, verified, its trials and its sample answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import InputError
from holdfast.files import read_text
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

#: What is told of a trial, and of an answer.
_RECORD = frozenset(
    {"kind", "target", "number", "stage", "seed", "attack", "setting", "end", "reason", "prompts", "points", "command"}
)
_ANSWER = frozenset({"set", "row", "prompt", "answer", "grade", "judge"})


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
    files = {(kind, target): folder / SAMPLES / f"{kind}-{target}.jsonl" for kind in KINDS for target in TARGETS}
    samples = {of: _rows(path) for of, path in files.items() if path.exists()}
    return Findings(folder, certificate, trials, samples)


def _trial(path: Path) -> dict[str, Any]:
    record = _object(path, read_text(path), "a trial record")
    if record.get("schema") != SCHEMA:
        raise InputError(f"{path}: is a trial record of schema {record.get('schema')!r}; this Holdfast reads {SCHEMA}")
    if lacking := _RECORD - record.keys():
        raise InputError(f"{path}: has no {min(lacking)!r}; expected a trial record of holdfast stress")
    if record["kind"] not in KINDS or record["target"] not in TARGETS:
        what = f"{record['kind']!r} on {record['target']!r}"
        raise InputError(f"{path}: is of {what}; expected a kind of attacker on the model or its counterpart")
    return record


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path).split("\n")  # not at other marks that end a line: answers may hold them
    return [_answer(f"{path}, row {row}", line) for row, line in enumerate(lines, 1) if line.strip()]


def _answer(where: str, line: str) -> dict[str, Any]:
    row = _object(where, line, "an answer")
    if lacking := _ANSWER - row.keys():
        raise InputError(f"{where}: has no {min(lacking)!r}; expected an answer of holdfast stress")
    return row


def _object(where: Path | str, text: str, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON ({error}); expected {what} of holdfast stress") from error
    if not isinstance(found, dict):
        raise InputError(f"{where}: is no JSON object; expected {what} of holdfast stress")
    return found

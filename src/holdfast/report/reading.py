"""The folder of a stress test as a report reads it: its certificate, verified, its trials and its sample answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.errors import InputError
from holdfast.files import parse_json, read_text
from holdfast.layout import Layout, all_of, fields, one_of, require
from holdfast.stress.certificate import MARKER, SAMPLES, STARTED, TRIALS, read_certificate
from holdfast.stress.schema import ANSWER, KINDS, RECORD, TARGETS


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
    targets = [target for target in TARGETS if certificate[target] is not None]
    record = all_of(RECORD, fields({"target": one_of(targets)}))
    paths = sorted(folder.glob(f"{TRIALS}/*/*.json"))
    trials = [_read(path, read_text(path), record, "a trial record") for path in paths]
    kinds = [kind for kind in KINDS if kind in certificate["attackers"]]
    files = {(kind, target): folder / SAMPLES / f"{kind}-{target}.jsonl" for kind in kinds for target in targets}
    samples = {of: _rows(path) for of, path in files.items() if path.exists()}
    return Findings(folder, certificate, trials, samples)


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path).split("\n")  # not at other marks that end a line: answers may hold them
    named = ((f"{path}, row {row}", line) for row, line in enumerate(lines, 1) if line.strip())
    return [_read(where, line, ANSWER, "an answer") for where, line in named]


def _read(where: Path | str, text: str, layout: Layout, what: str) -> dict[str, Any]:
    """An object of JSON that is laid out as it has to be."""
    what = f"{what} of holdfast stress"
    try:
        found = parse_json(text)
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON ({error}); expected {what}") from error
    return require(where, found, layout, what)

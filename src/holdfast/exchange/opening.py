"""Whose exchange a folder is: `exchange.json`, written once by the defender and read by everyone; and its end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from holdfast.errors import InputError
from holdfast.files import write_json

EXCHANGE, FINISHED, FORMAT = "exchange.json", "finished.json", 1


def claim(folder: Path, run: str, fingerprint: Mapping[str, str]) -> None:
    """Write `exchange.json` if there is none yet, making the folder. Of several that try at once, one wins.

    Raises:
        InputError: The folder is a file.
        OSError: It cannot be made or written.
    """
    if (folder / EXCHANGE).exists():
        return
    if folder.is_file():
        raise InputError(f"--exchange {folder} is a file, but a folder is expected")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{EXCHANGE}.{uuid4().hex}"
    try:
        write_json(temporary, {"format": FORMAT, "run": run, "fingerprint": dict(fingerprint)})
        os.link(temporary, folder / EXCHANGE)  # unlike a rename, fails where another was faster
    except FileExistsError:
        return
    finally:
        temporary.unlink(missing_ok=True)


def run_of(folder: Path, origin: str, run: str | None, fingerprint: Mapping[str, str]) -> str:
    """The run that an exchange belongs to.

    Args:
        folder: The exchange.
        origin: Who asks.
        run: The run that it must belong to; None if any will do.
        fingerprint: What the model of `origin` must have in common with it.

    Raises:
        InputError: There is no exchange, it is another run's, or this job does not fit it.
    """
    found = _read(folder)
    if run is not None and found["run"] != run:
        raise InputError(
            f"--exchange {folder} belongs to the run {found['run']}, not to {run}; "
            "name a folder of its own, or delete this one if that run is over"
        )
    if part := first_difference(found["fingerprint"], fingerprint):
        raise InputError(
            f"--exchange {folder} was not opened with the same {part} as {origin} has; "
            "every job of an exchange needs the same model, tokenizer and trained parameters"
        )
    return str(found["run"])


def opened_with(folder: str | Path) -> dict[str, str]:
    """The fingerprint that an exchange was opened with.

    Raises:
        InputError: There is no exchange, or none that this version of Holdfast can read.
    """
    return dict(_read(Path(folder))["fingerprint"])


def is_finished(folder: str | Path) -> bool:
    """Whether the run that opened an exchange last is over."""
    return Path(folder, FINISHED).is_file()


def first_difference(expected: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """The first part in which two fingerprints differ, or None."""
    return next((part for part in sorted({*expected, *found}) if expected.get(part) != found.get(part)), None)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / EXCHANGE
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"--exchange {folder} has no {EXCHANGE}; a defender must open it first") from error
    except OSError as error:
        raise InputError(f"--exchange {folder} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON; name another folder, or delete this one if no run uses it") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{path} is not of format {FORMAT}, which this Holdfast writes; name another folder")
    if not isinstance(found.get("run"), str) or not isinstance(found.get("fingerprint"), dict):
        raise InputError(f"{path} does not name its run and fingerprint; name another folder")
    return found

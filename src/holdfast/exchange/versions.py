"""Versions of weights as folders: visible whole or not at all, checked before use, the newest three kept.

A version is FOLDER/<origin>/<number>, its safetensors files and their manifest. Numbers alone say which is newer: no
clock has a part in it.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.exchange.leases import leased_versions
from holdfast.exchange.opening import first_difference
from holdfast.files import digest, flush, write_json
from holdfast.hub import reason

logger = logging.getLogger(__name__)

MANIFEST, FORMAT = "manifest.json", 2
KEPT = 3
_FIELDS = {"number": int, "origin": str, "step": int, "run": str, "fingerprint": dict, "facts": dict, "files": dict}


class BadVersionError(ValueError):
    """A version that must not be used; the message says what is wrong with it."""


@dataclass(frozen=True)
class Version:
    """One version of weights, whole when it was checked.

    Attributes:
        number: Later versions of an origin have higher ones.
        origin: "defender" or an attacker's name.
        step: The defender's update that its weights, or those it attacked, are from.
        facts: What its writer said about it.
        path: Its folder.
    """

    number: int
    origin: str
    step: int
    facts: Mapping[str, Any]
    path: Path


def name_of(number: int) -> str:
    """The folder of a version within its origin's."""
    return f"{number:06d}"


def numbers(folder: Path) -> list[int]:
    """The numbers of an origin's visible versions, ascending; none where it has none or cannot be listed."""
    try:
        return sorted(int(path.name) for path in folder.iterdir() if re.fullmatch("[0-9]{6,}", path.name))
    except OSError:
        return []


def make_visible(temporary: Path, version: Version, run: str, fingerprint: Mapping[str, str], files: set[str]) -> None:
    """Give a written folder its manifest, then its name.

    Args:
        temporary: The folder, beside its place to be.
        version: What it becomes.
        run: The run that it is from.
        fingerprint: Of the model that it is from.
        files: The names of the files that all ranks have written into it.

    Raises:
        OSError: Storage failed, or a file is not there, as where ranks see different folders under one name.
    """
    manifest = {
        "format": FORMAT,
        "origin": version.origin,
        "number": version.number,
        "step": version.step,
        "run": run,
        "fingerprint": dict(fingerprint),
        "facts": dict(version.facts),
        "files": {name: _measured(temporary / name) for name in sorted(files)},
    }
    write_json(temporary / MANIFEST, manifest)
    flush(temporary)
    temporary.rename(version.path)
    flush(version.path.parent)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a version.

    Raises:
        BadVersionError: It is missing or not what Holdfast writes.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except OSError as error:
        raise BadVersionError(f"its {MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise BadVersionError(f"its {MANIFEST} is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BadVersionError(f"its {MANIFEST} is not of format {FORMAT}")
    for field, kind in _FIELDS.items():
        if not isinstance(manifest.get(field), kind):
            raise BadVersionError(f"its {MANIFEST} has no proper {field!r}")
    return manifest


def checked(path: Path, run: str, fingerprint: Mapping[str, str]) -> Version:
    """The version in a folder, every byte of it checked against its manifest.

    Raises:
        BadVersionError: It must not be used.
    """
    manifest = read_manifest(path)
    if (manifest["origin"], name_of(manifest["number"])) != (path.parent.name, path.name):
        raise BadVersionError(f"its {MANIFEST} is that of version {manifest['number']} of {manifest['origin']}")
    if manifest["run"] != run:
        raise BadVersionError(f"it belongs to another run, {manifest['run']}")
    if part := first_difference(fingerprint, manifest["fingerprint"]):
        raise BadVersionError(f"it was not made with the same {part}")
    try:
        _check_files(path, manifest["files"])
    except OSError as error:
        raise BadVersionError(f"it cannot be read ({error.strerror})") from error
    return Version(manifest["number"], manifest["origin"], manifest["step"], manifest["facts"], path)


def prune(exchange: Path, origin: str) -> None:
    """Delete all but the newest versions of an origin and those under a live lease.

    A version loses its name before its files, so that none is ever seen half deleted.
    """
    leased = leased_versions(exchange)
    for number in numbers(exchange / origin)[:-KEPT]:
        path = exchange / origin / name_of(number)
        if f"{origin}/{path.name}" in leased:
            continue
        hidden = path.with_name(f".{path.name}.deleted")
        try:
            path.rename(hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            logger.warning("old version %s cannot be deleted (%s)", path, error.strerror)


def delete_hidden(folder: Path) -> None:
    """Delete what a killed writer has left of versions that are not, or no longer, visible."""
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def why(error: BaseException) -> str:
    """What went wrong, for use inside a sentence that names the folder itself."""
    return error.strerror if isinstance(error, OSError) and error.strerror else reason(error)


def _check_files(path: Path, expected: Mapping[str, Any]) -> None:
    found = {file.name for file in path.glob("*.safetensors")}
    if missing := sorted(expected.keys() - found):
        raise BadVersionError(f"its file {missing[0]} is missing")
    if unlisted := sorted(found - expected.keys()):
        raise BadVersionError(f"its file {unlisted[0]} is not in its {MANIFEST}")
    for name, listed in expected.items():
        measured = _measured(path / name)
        if not isinstance(listed, dict) or listed.get("bytes") != measured["bytes"]:
            raise BadVersionError(f"its file {name} has {measured['bytes']} bytes, not as many as its {MANIFEST} says")
        if listed.get("sha256") != measured["sha256"]:
            raise BadVersionError(f"the checksum of its file {name} is wrong")


def _measured(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": digest(path)}

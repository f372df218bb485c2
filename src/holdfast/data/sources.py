"""What a data flag names: a file, a data set of the Hub, one of the catalogue, or several of them joined."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from holdfast.data.catalogue import catalogue, source_of
from holdfast.errors import InputError
from holdfast.files import parse_json

Source = str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]]
"""What names rows: a text (see `parse`), a mapping with the fields of `Part`, or a list of these to be joined."""

SIDES = ("chosen", "rejected", "safe", "unsafe")
"""Which answers of rows with two can be taken."""

_URL = ("https://", "http://")
_COLON = re.compile(r":(?![^\[]*\])")  # but for those of a slice, as in train[:100]


@dataclass(frozen=True)
class Part:
    """Rows of one data set, with the names that `datasets` and TRL have for what they share.

    Attributes:
        path: A file, a folder that `datasets` can read, the id of a data set on the Hub, or the address of a file.
        name: Its configuration.
        split: Its split, as in `train` or `test[:100]`.
        revision: A branch, tag or commit of the Hub.
        where: By column the value, or a list of the values, that rows must have to be taken.
        take: Of rows with two answers those that are `chosen` or `rejected`, or each that is `safe` or `unsafe`.
        columns: By what Holdfast calls it, the column that it is found in (`holdfast.data.shapes.MAPPED`).
        limit: Only the first so many of the rows that are left.
        fraction: Its share of several sources that are joined.
        entry: Its name in the catalogue.
    """

    path: str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    where: Mapping[str, Any] | None = None
    take: str | None = None
    columns: Mapping[str, Any] | None = None
    limit: int | None = None
    fraction: float | None = None
    entry: str | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        place = ":".join(filter(None, [self.path, self.name, self.split]))
        return place if self.entry is None else self.entry

    @property
    def file(self) -> Path | None:
        """The file that it is, if it is one."""
        return existing(self.path, Path.is_file)

    @property
    def is_address(self) -> bool:
        """Whether it is a file elsewhere, by its address."""
        return self.path.startswith(_URL)

    def rule(self) -> dict[str, Any]:
        """Everything that was asked for, for a record."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def parse(source: Source, *, flag: str) -> list[Part]:
    """Read what a data flag was given.

    Args:
        source: A file, a folder, `OWNER/NAME`, `OWNER/NAME:SPLIT` or `OWNER/NAME:CONFIG:SPLIT` on the Hub, a name of
            the catalogue (also with a split, or with both), or an address; a mapping with the fields of `Part`, whose
            path is one of these; or a list of these. Mappings and lists may also come as JSON. What there is on disk
            wins, but for a folder that has the name of an entry of the catalogue.
        flag: The flag, for errors.

    Returns:
        The parts, in order.

    Raises:
        InputError: An unknown field, or a value of it that means nothing.
    """
    if isinstance(source, str) and source.lstrip()[:1] in ("{", "[") and existing(source, Path.exists) is None:
        try:
            source = parse_json(source)
        except ValueError as error:
            raise InputError(f"{flag}: {source!r} is not valid JSON ({error})") from error
    given = [source] if isinstance(source, str | Mapping) else source
    if not given:
        raise InputError(f"{flag} is an empty list; expected at least one source")
    parts = []
    for one in given:
        if not isinstance(one, str | Mapping):
            raise InputError(f"{flag}: a source in a list must be a name or a mapping, got {json.dumps(one)}")
        parts.append(_from_text(one) if isinstance(one, str) else _from_mapping(one, flag))
    if len(parts) == 1 and parts[0].fraction is not None:  # which would be all of it
        raise InputError(
            f"{flag}: {parts[0].label} has a fraction, but is the only source; expected several that share, or a "
            "limit, for the first so many rows"
        )
    lacking = [part for part in parts if part.fraction is None]
    if lacking and len(lacking) < len(parts):
        raise InputError(f"{flag}: {lacking[0].label} has no fraction, but others have; give all of them one, or none")
    return parts


def named(source: Source) -> str:
    """What messages call a source that can be read: as it was typed, or the names of its parts."""
    if isinstance(source, str) and source.lstrip()[:1] not in ("{", "["):
        return source
    return " + ".join(part.label for part in parse(source, flag="data"))


def asking(flag: str, part: Part, **more: Any) -> str:
    """The flag as it would have to be typed to ask for more of a part."""
    path = part.path if part.entry is None else part.entry
    given = {key: value for key, value in part.rule().items() if part.entry is None and key not in ("path", "fraction")}
    return f"{flag} '{json.dumps({'path': path, **given, **more}, ensure_ascii=False)}'"


def existing(text: str, is_there: Any) -> Path | None:
    """The path that a text is, if something of that kind is there."""
    try:
        path = Path(text).expanduser()
        return path if is_there(path) else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, an unknown home, a null character
        return None


def _from_text(text: str) -> Part:
    if existing(text, Path.is_file) is not None or text.startswith(_URL):
        return Part(text)
    if text not in catalogue() and existing(text, Path.exists) is not None:
        return Part(text)
    path, *rest = _COLON.split(text)
    if len(rest) > 2 or any("/" in word or "\\" in word for word in rest):  # a colon of a path on Windows, say
        return Part(text)
    name, split = (rest[0] or None, rest[1] or None) if len(rest) == 2 else (None, (*rest, "")[0] or None)
    if path in catalogue():
        given = {key: value for key, value in (("name", name), ("split", split)) if value is not None}
        return Part(**{**source_of(path), **given}, entry=path)
    return Part(path, name=name, split=split)


_KNOWN = [field.name for field in fields(Part) if field.name != "entry"]


def _from_mapping(given: Mapping[str, Any], flag: str) -> Part:
    for key in given:
        if key not in _KNOWN:
            meant = difflib.get_close_matches(str(key), _KNOWN, n=1)
            hint = f" (did you mean {meant[0]}?)" if meant else ""
            raise InputError(f"{flag}: a source has no {key!r}{hint}; expected {', '.join(_KNOWN)}")
    if not isinstance(given.get("path"), str) or not given["path"]:
        raise InputError(
            f"{flag}: a source needs a path, a file or the name of a data set; got {json.dumps(given, default=str)}"
        )
    part = replace(_from_text(given["path"]), **{key: value for key, value in given.items() if key != "path"})
    for key, (fits, expected) in _VALUES.items():
        value = getattr(part, key)
        if value is not None and not fits(value):
            raise InputError(f"{flag}: {key} of {part.path} must be {expected}, got {json.dumps(value, default=str)}")
    return part


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_above_zero(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


# What the values of a mapping must be, and what messages say of that.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("name", "split", "revision"), (_is_text, "a text")),
    "where": (_is_mapping, "a mapping from columns to values"),
    "columns": (_is_mapping, "a mapping from names to columns"),
    "take": (SIDES.__contains__, f"one of {', '.join(SIDES)}"),
    "limit": (partial(_is_above_zero, kind=int), "a number of rows"),
    "fraction": (partial(_is_above_zero, kind=int | float), "a positive number"),
}

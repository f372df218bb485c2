"""What a JSON object has to hold, entry by entry: layouts, and the check that one fits before it is used."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import InputError
from holdfast.files import kind_of_value

Layout = Callable[[Any, str], None]
"""Called with an entry and its place, such as `attackers.full`; what it raises says what the entry should be."""


class MisfitError(ValueError):
    """An entry is not what it has to be; the message names it and says what was expected."""


def require(where: Path | str, found: Any, layout: Layout, what: str) -> dict[str, Any]:
    """Make sure that what was read from a file is laid out as it has to be.

    Args:
        where: The file, and the row of it.
        found: What was read there.
        layout: What it has to be like: an object.
        what: What that is called, as "a trial record of holdfast stress".

    Returns:
        What was read.

    Raises:
        InputError: It is not; the sentence names the entry.
    """
    if not isinstance(found, dict):
        raise InputError(f"{where}: is no JSON object; expected {what}")
    try:
        layout(found, "")
    except MisfitError as misfit:
        raise InputError(f"{where}: {misfit}; expected {what}") from None
    return found


def kind(wanted: str, *types: type) -> Layout:
    """A value of one of these types; a boolean is no number."""

    def check(found: Any, place: str) -> None:
        if type(found) not in types:
            raise MisfitError(f"its {place!r} is {kind_of_value(found)}, not {wanted}")

    return check


def number(low: float, high: float, *, whole: bool = False) -> Layout:
    """A number from `low` to `high`."""
    of_kind = kind("a whole number", int) if whole else kind("a number", int, float)

    def check(found: Any, place: str) -> None:
        of_kind(found, place)
        if not low <= found <= high:
            raise MisfitError(f"its {place!r} is {found}, not from {low:g} to {high:g}")

    return check


def exactly(value: int) -> Layout:
    """That number."""

    def check(found: Any, place: str) -> None:
        if type(found) is not int or found != value:
            raise MisfitError(f"its {place!r} is {found!r:.30}, not {value}")

    return check


def one_of(known: Collection[str]) -> Layout:
    """One of these words."""

    def check(found: Any, place: str) -> None:
        if not isinstance(found, str) or found not in known:
            raise MisfitError(f"its {place!r} is {found!r:.30}, not one of {', '.join(known)}")

    return check


def date(found: Any, place: str) -> None:
    """A day, as text."""
    TEXT(found, place)
    try:
        datetime.date.fromisoformat(found)
    except ValueError:
        raise MisfitError(f"its {place!r} is {found!r:.30}, not a date such as 2026-11-26") from None


def maybe(layout: Layout) -> Layout:
    """The same, or null."""
    return lambda found, place: None if found is None else layout(found, place)


def many(layout: Layout, *, least: int = 0) -> Layout:
    """A list, of so many at least."""

    def check(found: Any, place: str) -> None:
        LIST(found, place)
        if len(found) < least:
            raise MisfitError(f"its {place!r} has {len(found)} entries, not {least} at least")
        for place_of_one, one in enumerate(found):
            layout(one, f"{place}.{place_of_one}")

    return check


def fields(layouts: Mapping[str, Layout]) -> Layout:
    """An object that has these entries, and any others."""

    def check(found: Any, place: str) -> None:
        OBJECT(found, place)
        for name, layout in layouts.items():
            inner = f"{place}.{name}".removeprefix(".")
            if name not in found:
                raise MisfitError(f"has no {inner!r}")
            layout(found[name], inner)

    return check


def each(layout: Layout, names: Layout | None = None) -> Layout:
    """An object of entries that are all alike, under any names or such names alone."""

    def check(found: Any, place: str) -> None:
        OBJECT(found, place)
        for name, one in found.items():
            if names is not None:
                names(name, f"{place}.{name}")
            layout(one, f"{place}.{name}")

    return check


def all_of(*layouts: Layout) -> Layout:
    """What each of these asks for."""

    def check(found: Any, place: str) -> None:
        for layout in layouts:
            layout(found, place)

    return check


def depending(on: Mapping[str, Layout], choose: Callable[[Mapping[str, Any]], Layout]) -> Layout:
    """An object of which some entries say what the others have to be."""

    def check(found: Any, place: str) -> None:
        fields(on)(found, place)
        choose(found)(found, place)

    return check


OBJECT, LIST = kind("an object", dict), kind("a list", list)
TEXT, FLAG = kind("text", str), kind("true or false", bool)
NULL = kind("null", type(None))

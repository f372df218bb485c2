"""`holdfast data`: the catalogue of data sets, and what would be read of any source."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from rich import box
from rich.table import Column, Table
from rich.text import Text

from holdfast.cli.console import say, set_up_logging, stdout
from holdfast.cli.parser import HoldfastParser
from holdfast.data.catalogue import catalogue
from holdfast.data.formats import ORIGIN, as_message, text_of
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.errors import InputError

#: What sentences call the source, so that what one of them says to type can be typed.
_FLAG = "holdfast data"

#: How much of a text is shown.
_CUT = 70

#: What rows are read as: to be trained on if that is possible, else to be asked.
_COLUMNS = (*TRAIN_COLUMNS, ("prompt",))


@dataclass
class DataArguments:
    """The flags of `data`."""

    show: int = field(
        default=3, metadata={"help": "How many of the first rows to show, their texts cut short; 0 for none."}
    )

    def __post_init__(self) -> None:
        if self.show < 0:
            raise InputError(f"--show must not be negative, got {self.show}")


def run(argv: list[str]) -> int:
    """List the catalogue, or show what is read of a source.

    Args:
        argv: The words after `data`.

    Returns:
        The exit code.

    Raises:
        InputError: A source that is not of the catalogue cannot be read.
    """
    set_up_logging()
    parser = HoldfastParser(
        (DataArguments,),
        prog="holdfast data",
        description="List the data sets that data flags know by name, or show what they would read of a source.",
        positional="[SOURCE]",
    )
    parser.add_argument(
        "source", nargs="?", metavar="SOURCE", help="A name of the catalogue, or whatever else a data flag may name."
    )
    options, rest = parser.parse(argv)
    if rest.source is None:
        stdout.print(_table())
        say("† from memory, check it before you rely on it; holdfast data NAME shows an entry, and its rows")
        return 0
    name = rest.source.partition(":")[0]
    entry = catalogue().get(name)
    if entry is not None:
        stdout.print(_about(name, entry))
    noted: dict[str, Any] = {}
    try:
        rows = load_rows(rest.source, flag=_FLAG, columns=_COLUMNS, noted=noted)
    except InputError as error:
        if entry is None:
            raise
        say(f"its rows cannot be read here: {error}")
        return 0
    _show(rows, noted[_FLAG], options.show)
    return 0


def _table() -> Table:
    """The catalogue at a glance."""
    table = Table("name", Column("what it is for, where it lies, licence", overflow="fold"), box=box.SIMPLE_HEAD)
    table.columns[0].no_wrap = True
    for name, entry in catalogue().items():
        remembered = {key: "†" if key in entry.get("from_memory", ()) else "" for key in entry}
        place = ":".join(entry[key] for key in ("path", "name", "split") if key in entry)
        gated = ", gated" if entry.get("gated") else ""
        where = f"{place}{remembered['path']} · {entry['licence']}{remembered['licence']}{gated}"
        table.add_row(Text(name), Text(f"{entry['use']}{remembered['use']}\n{where}"))
    return table


def _about(name: str, entry: Mapping[str, Any]) -> Table:
    """An entry as a recipe would have it, and what there is to know beside that."""
    table = Table(box=None, show_header=False, title=name, title_justify="left", pad_edge=False)
    for key, value in entry.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        table.add_row(f"{key}:", Text(", ".join(value) if key == "from_memory" else shown))
    return table


def _show(rows: Dataset, parts: Sequence[Mapping[str, Any]], count: int) -> None:
    """How many rows there are, how they are read, and the first of them."""
    for part in parts:
        commit = f" at commit {part['revision']}" if "revision" in part else ""
        stdout.print(Text(f"{part.get('entry') or part['path']}: {part['taken']} of {part['rows']} rows{commit}"))
    group = next(group for group in _COLUMNS if set(group) <= set(rows.column_names))
    others = [name for name in rows.column_names if name not in group and name != ORIGIN]
    beside = f", beside {', '.join(others)}" if others else ""
    stdout.print(Text(f"read as {' and '.join(group)}{beside}"))
    if not count:
        return
    table = Table("row", *group, box=box.SIMPLE_HEAD, pad_edge=False)
    for number, row in enumerate(rows.select(range(min(count, len(rows)))), 1):
        table.add_row(str(number), *(Text(_short(row[name])) for name in group))
    stdout.print(table)


def _short(cell: Any) -> str:
    """A text, or the texts of messages, cut short."""
    text = cell
    if isinstance(cell, list):
        turns = [as_message(turn) for turn in cell]
        text = " ".join(f"{turn['role']}: {text_of(turn) or json.dumps(turn.get('tool_calls'))}" for turn in turns)
    text = " ".join(text.split())
    return text if len(text) <= _CUT else f"{text[:_CUT]} …"

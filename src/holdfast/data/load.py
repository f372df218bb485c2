"""Reading rows from a file or from the Hub, with errors that name the row."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.table import InMemoryTable

from holdfast.errors import InputError
from holdfast.hub import is_hub_id, reason, unreachable

Prompt = str | Sequence[Mapping[str, Any]]
"""A prompt: text, or messages with `role` and `content`."""

TRAIN_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("messages",), ("conversations",))
"""The columns a training file may have: one of these groups."""

PROMPT_COLUMNS = (("prompt",),)
"""The column that a file of prompts must have."""

_DEFAULT_SPLIT = "train"


def load_rows(source: str, *, flag: str, columns: Sequence[Sequence[str]] = ()) -> Dataset:
    """Read a data set, and check that its rows can be used.

    Args:
        source: A `.json` (a list of objects, or one object per line), `.jsonl`, `.parquet` or `.csv` file, or a Hub
            id with an optional `:split` (`train` if none is given). A file on disk wins over a Hub id.
        flag: The flag that named the source, for errors.
        columns: Groups of columns. The first group that the data has must be complete in every row, and its cells
            must be text or messages (lists of objects with `role` and `content`, or `from` and `value` in a column
            `conversations`). Other columns are carried along.
            Without groups nothing is checked.

    Returns:
        The rows, all of them in memory if they come from a file.

    Raises:
        InputError: If the source is neither a file nor a readable Hub data set, or is empty, or a row cannot be
            used. Rows count from 1; in a file with one object per line the row is the line.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{flag} {source} is a folder; expected one of {_expected_files()} or a Hub id")
    if path.exists():
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise InputError(f"{flag} {source} has an unknown extension; expected one of {_expected_files()}")
        required = [name for group in columns for name in group]
        rows = reader(path, f"{flag} {source}", required)
    else:
        rows = _from_hub(source, flag)
    if len(rows) == 0:
        raise InputError(f"{flag} {source} is empty; expected at least one row")
    if columns:
        _check(rows, f"{flag} {source}", columns)
    return rows


def _from_hub(source: str, flag: str) -> Dataset:
    name, _, split = source.partition(":")
    missing = f"{flag} {source} is neither a file nor a data set on the Hub"
    if Path(name).suffix.lower() in _READERS or not is_hub_id(name):
        raise InputError(f"{missing}; no such file")
    if why := unreachable(name, "dataset"):
        raise InputError(f"{missing} that can be read ({why})")
    try:
        return load_dataset(name, split=split or _DEFAULT_SPLIT)
    except Exception as error:  # builders raise whatever the data make them raise
        raise InputError(f"{flag} {source} cannot be read from the Hub ({reason(error)})") from error


def _from_json(path: Path, label: str, required: Sequence[str]) -> Dataset:
    text = _text(path, label)
    if text.lstrip().startswith("["):
        try:
            return _from_objects(list(enumerate(json.loads(text), 1)), label)
        except ValueError as error:
            raise InputError(f"{label} is not valid JSON ({reason(error)})") from error
    return _from_jsonl(path, label, required)


def _from_jsonl(path: Path, label: str, _: Sequence[str]) -> Dataset:
    rows = []
    # Not str.splitlines: that also splits at separators which JSON allows inside strings.
    for number, line in enumerate(_text(path, label).split("\n"), 1):
        if line.strip():
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise InputError(f"{label}, row {number}: not valid JSON ({reason(error)})") from error
    return _from_objects(rows, label)


def _from_objects(rows: list[tuple[int, Any]], label: str) -> Dataset:
    """Turn numbered objects into a data set that has every object's columns."""
    names: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{label}, row {number} is {_kind(row)}; expected an object")
        names.update(dict.fromkeys(row))
    complete = [{name: row.get(name) for name in names} for _, row in rows]
    if not complete:
        return Dataset.from_list([])
    try:
        return Dataset.from_list(complete)
    except _ARROW_ERRORS as error:
        # Arrow does not say which row it stumbled over. Types are those of the rows before, so the shortest
        # failing beginning ends with the culprit.
        fine, bad = 0, len(complete)
        while bad - fine > 1:
            middle = (fine + bad) // 2
            try:
                Dataset.from_list(complete[:middle])
                fine = middle
            except _ARROW_ERRORS:
                bad = middle
        raise InputError(
            f"{label}, row {rows[bad - 1][0]} has other types than the rows before it ({reason(error)})"
        ) from error


def _from_csv(path: Path, label: str, required: Sequence[str]) -> Dataset:
    if not _text(path, label).strip():
        return Dataset.from_list([])
    # Answers such as "42" are text, whatever they look like.
    options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys([*required, "answer"], pa.string()))
    try:
        table = pyarrow.csv.read_csv(
            path,
            # Only a reader without threads knows the number of a row it cannot read.
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
            convert_options=options,
        )
    except pa.ArrowException as error:
        raise InputError(f"{label} is not a valid CSV file ({reason(error)})") from error
    return Dataset(InMemoryTable(table))


def _from_parquet(path: Path, label: str, _: Sequence[str]) -> Dataset:
    if path.stat().st_size == 0:
        return Dataset.from_list([])
    try:
        return Dataset(InMemoryTable(pyarrow.parquet.read_table(path)))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{label} is not a valid Parquet file ({reason(error)})") from error


def _text(path: Path, label: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{label} cannot be read ({error.strerror})") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{label} is not valid UTF-8 (byte 0x{content[error.start]:02x} at offset {error.start}, line {line})"
        ) from error


def _check(rows: Dataset, label: str, groups: Sequence[Sequence[str]]) -> None:
    """Check that one group of columns is there, complete and of a usable type."""
    group = next((group for group in groups if set(group) <= set(rows.column_names)), None)
    if group is None:
        wanted = " or ".join(" + ".join(repr(name) for name in group) for group in groups)
        found = ", ".join(repr(name) for name in rows.column_names)
        raise InputError(f"{label} has no column {wanted}; its columns are {found}")
    for name in group:
        for number, cell in enumerate(rows[name], 1):
            if problem := _problem(cell, ("from", "value") if name == "conversations" else ("role", "content")):
                raise InputError(f"{label}, row {number}: {name!r} {problem}; expected text or messages")


def _problem(cell: Any, keys: tuple[str, str]) -> str | None:
    """Return what keeps a cell from being text or messages, or None."""
    if isinstance(cell, str):
        return None
    if not isinstance(cell, list):
        return "is missing" if cell is None else f"is {_kind(cell)}"
    if not cell:
        return "has no messages"
    for message in cell:
        if not isinstance(message, dict):
            return f"holds {_kind(message)} where a message is expected"
        for key in keys:
            if not isinstance(message.get(key), str):
                return f"has a message without a text {key!r}"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _expected_files() -> str:
    return ", ".join(_READERS)


_ARROW_ERRORS = (pa.ArrowException, UnicodeError, OverflowError)
_READERS: dict[str, Callable[[Path, str, Sequence[str]], Dataset]] = {
    ".json": _from_json,
    ".jsonl": _from_jsonl,
    ".parquet": _from_parquet,
    ".csv": _from_csv,
}

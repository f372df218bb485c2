"""Files of rows as data sets: JSON, CSV and Parquet, with errors that name the line or row."""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset
from datasets.table import InMemoryTable

from holdfast.errors import InputError
from holdfast.hub import reason

_GZIP = ".gz"


def is_data_file(name: str) -> bool:
    """Return whether a file of this name is one that `read_file` takes."""
    return _kind_of(name) in _READERS


def expected_files() -> str:
    """The files that `read_file` takes, for messages."""
    return f"{', '.join(_READERS)} (all but .parquet also as .gz)"


def read_file(path: Path, label: str, columns: Collection[str]) -> Dataset:
    """Read a file of rows.

    Args:
        path: A `.json` or `.jsonl` file (a list of objects, an object per line, one object, or an object that holds the
            list), `.csv` or `.tsv` (also with semicolons), or `.parquet`. Text is UTF-8, or UTF-16 with a byte order
            mark; all but Parquet may be gzipped.
        label: What messages call the file.
        columns: The columns that are looked for. In CSV they are text, whatever they look like; a JSON object that has
            one of them is a row.

    Returns:
        The rows, all of them in memory. What an object of JSON does not have is null; values that are neither text,
        numbers nor plain messages are of the feature `Json`, and so come back as they were given: without the keys
        that other rows have, and (but for the last digits of a float) without a change of type.

    Raises:
        InputError: The file cannot be read, or a row of it.
    """
    kind = _kind_of(path.name)
    if kind not in _READERS:
        raise InputError(f"{label} has an unknown extension; expected one of {expected_files()}")
    return _READERS[kind](path, label, columns)


def _kind_of(name: str) -> str:
    """The extension that tells how to read a file, in small letters."""
    suffix = Path(name.lower()).suffix
    if suffix != _GZIP:
        return suffix
    packed = Path(name.lower().removesuffix(_GZIP)).suffix
    return suffix if packed == ".parquet" else packed


def _from_json(path: Path, label: str, columns: Collection[str]) -> Dataset:
    text = _text(path, label)
    try:
        whole = _parse(text)
    except ValueError as error:
        is_more_than_one = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if _kind_of(path.name) == ".jsonl" or is_more_than_one:
            return _from_lines(text, label)
        if not text.strip():
            return Dataset.from_list([])
        raise InputError(f"{label} is not valid JSON ({reason(error)})") from error
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 and not whole.keys() & set(columns) else [whole]
    elif not isinstance(whole, list):
        whole = [whole]
    return _from_objects(whole, [f"row {number}" for number in range(1, len(whole) + 1)], label)


def _from_lines(text: str, label: str) -> Dataset:
    objects, places = [], []
    # Not str.splitlines: that also splits at separators which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                objects.append(_parse(line))
            except ValueError as error:
                raise InputError(
                    f"{label}, line {number} is not valid JSON ({reason(error)}); expected an object per line, "
                    "or a list of objects"
                ) from error
            places.append(f"line {number}")
    return _from_objects(objects, places, label)


def _parse(text: str) -> Any:
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _integer(digits: str) -> int:
    number = int(digits)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"the number {digits[:30]} has more than 64 bits")
    return number


def _from_objects(objects: list[Any], places: list[str], label: str) -> Dataset:
    """Turn objects into a data set that has every object's columns."""
    names: dict[str, None] = {}
    for row, place in zip(objects, places, strict=True):
        if not isinstance(row, dict):
            raise InputError(f"{label}, {place} is {kind_of_value(row)}; expected an object")
        names.update(dict.fromkeys(row))
    arrays = {}
    for name in names:
        cells = [row.get(name) for row in objects]
        try:
            arrays[name] = _array(cells)
        except UnicodeError as error:
            place = next(place for place, cell in zip(places, cells, strict=True) if not _is_unicode(cell))
            raise InputError(f"{label}, {place}: {name!r} is not Unicode text ({reason(error)})") from error
    return Dataset.from_dict(arrays)


def _array(cells: list[Any]) -> pa.Array:
    """Text, numbers, lists of them and plain messages as Arrow has them; anything else as JSON.

    Arrow has one type for a whole column, with every key that some row has.
    """
    if _is_uniform(cells):
        return pa.array(cells)
    written = [None if cell is None else json.dumps(cell, ensure_ascii=False) for cell in cells]
    return pa.array(written, pa.string()).cast(pa.json_())


def _is_uniform(cells: Sequence[Any]) -> bool:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds != {list}:
        return _is_flat(kinds)
    items = [item for cell in cells if cell is not None for item in cell]
    kinds = {type(item) for item in items}
    if kinds != {dict}:
        return _is_flat(kinds)
    keys = items[0].keys()
    return bool(keys) and all(
        item.keys() == keys and all(type(value) is str for value in item.values()) for item in items
    )


def _is_flat(kinds: set[type]) -> bool:
    return kinds <= {int, float} or kinds in ({str}, {bool})


def _is_unicode(cell: Any) -> bool:
    try:
        json.dumps(cell, ensure_ascii=False).encode()
    except UnicodeError:
        return False
    return True


def _from_csv(path: Path, label: str, columns: Collection[str]) -> Dataset:
    text = _text(path, label)
    if not text.strip():
        return Dataset.from_list([])
    header = text.lstrip().partition("\n")[0]
    # A table whose one column is called "prompt;completion" is none.
    delimiter = "\t" if _kind_of(path.name) == ".tsv" else next((mark for mark in ",;\t" if mark in header), ",")
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(text.encode()),
            # Only a reader without threads knows the number of a row it cannot read.
            read_options=pyarrow.csv.ReadOptions(use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            # Answers such as "42" are text, whatever they look like.
            convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
    except pa.ArrowException as error:
        raise InputError(f"{label} is not a valid CSV file ({reason(error)})") from error
    names = table.column_names
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"{label} has the column {twice!r} twice; expected every column once")
    return Dataset(InMemoryTable(table))


def _from_parquet(path: Path, label: str, _: Collection[str]) -> Dataset:
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
    if path.name.lower().endswith(_GZIP) and content:
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{label} is not a valid gzip file ({reason(error)})") from error
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{label} is not valid {'UTF-16' if is_utf16 else 'UTF-8'} "
            f"(byte 0x{content[error.start]:02x} at offset {error.start}, line {line})"
        ) from error
    if "\0" in text:
        raise InputError(f"{label} holds null characters; expected UTF-8 text, or UTF-16 with a byte order mark")
    return text


def kind_of_value(value: Any) -> str:
    """What messages call a value of JSON, such as "an object"."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


_READERS: dict[str, Callable[[Path, str, Collection[str]], Dataset]] = {
    ".json": _from_json,
    ".jsonl": _from_json,
    ".parquet": _from_parquet,
    ".csv": _from_csv,
    ".tsv": _from_csv,
}

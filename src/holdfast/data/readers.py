"""Files of rows as data sets: JSON, CSV and Parquet, with errors that name the line or row."""

import codecs
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset, DatasetInfo, Features
from datasets.fingerprint import generate_random_fingerprint
from datasets.table import InMemoryTable

from holdfast.errors import InputError
from holdfast.files import kind_of_value
from holdfast.hub import reason

ROWS_AT_A_TIME = 1_000
"""How many objects of JSON are held at once, before Arrow has them."""

BYTES_AT_A_TIME = 1 << 16
"""How much of a list of JSON is decoded at once, unless an item is longer."""

_GZIP = ".gz"
_PIECE = 1 << 20
_BLANKS = re.compile(r"[ \t\n\r]*")


def is_data_file(name: str) -> bool:
    """Return whether a file of this name is one that `read_file` takes."""
    return _kind_of(name) in _READERS


def expected_files() -> str:
    """The files that `read_file` takes, for messages."""
    return f"{', '.join(_READERS)} (all but .parquet also as .gz)"


def read_file(path: Path, label: str, columns: Collection[str], *, name: str | None = None) -> Dataset:
    """Read a file of rows.

    Args:
        path: A `.json` or `.jsonl` file (a list of objects, an object per line, one object, or an object that holds the
            list), `.csv` or `.tsv` (also with semicolons), or `.parquet`. Text is UTF-8, or UTF-16 with a byte order
            mark; all but Parquet may be gzipped.
        label: What messages call the file.
        columns: The columns that are looked for. In CSV they are text, whatever they look like; a JSON object that has
            one of them is a row.
        name: The file's own name, by which it is read, where it lies under another.

    Returns:
        The rows, all of them in memory, as Arrow has them. What an object of JSON does not have is null; values that
        are neither text, numbers nor plain messages are of the feature `Json`, and so come back as they were given:
        without the keys that other rows have, and (but for the last digits of a float) without a change of type.

    Raises:
        InputError: The file cannot be read, or a row of it.
    """
    kind = _kind_of(name or path.name)
    if kind not in _READERS:
        raise InputError(f"{label} has an unknown extension; expected one of {expected_files()}")
    if kind == ".parquet":
        return _from_parquet(path, label)
    content = _content(path, label, packed=(name or path.name).lower().endswith(_GZIP))
    return _READERS[kind](content, label, kind, columns) if re.search(rb"\S", content) else Dataset.from_list([])


def _kind_of(name: str) -> str:
    """The extension that tells how to read a file, in small letters."""
    suffix = Path(name.lower()).suffix
    if suffix != _GZIP:
        return suffix
    packed = Path(name.lower().removesuffix(_GZIP)).suffix
    return suffix if packed == ".parquet" else packed


def _from_json(content: bytes | bytearray, label: str, kind: str, columns: Collection[str]) -> Dataset:
    if _is_lines(content):
        return _from_lines(content, label)
    begin = re.search(rb"\S", content)
    if begin is not None and begin.group() == b"[":
        try:
            return _from_objects(_numbered(_items(content, begin.end())), label)
        except InputError:
            raise
        except (ValueError, RecursionError):
            pass  # what is wrong, and where, is told by reading it whole
    try:
        whole = _parse(content.decode())
    except ValueError as error:
        is_more_than_one = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        if kind == ".jsonl" or is_more_than_one:
            return _from_lines(content, label)
        raise InputError(f"{label} is not valid JSON ({reason(error)})") from error
    if isinstance(whole, dict):
        lists = {key: value for key, value in whole.items() if isinstance(value, list) and all(map(_is_object, value))}
        full = [key for key, value in lists.items() if value]
        if whole.keys() & set(columns) or not lists:
            whole = [whole]
        elif len(full) > 1:
            raise InputError(
                f"{label} is an object with several lists of rows, {', '.join(map(repr, full))}; expected one"
            )
        else:
            whole = lists[full[0]] if full else []
    elif not isinstance(whole, list):
        whole = [whole]
    return _from_objects(_numbered(whole), label)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _items(content: bytes | bytearray, start: int) -> Iterator[Any]:
    """The items of a list that is opened before `start`, one by one: together they take ten times their text.

    Raises:
        ValueError: From the parser, or something else stands between or behind them.
    """
    scan = json.JSONDecoder(parse_int=_integer).raw_decode
    decode = codecs.getincrementaldecoder("utf-8")().decode
    text, at, size, is_first = "", 0, BYTES_AT_A_TIME, True
    while True:
        at = _after_blanks(text, at)
        if is_first and text[at : at + 1] == "]":
            end = at
        else:
            try:
                item, end = scan(text, at)
                end = _after_blanks(text, end)
            except json.JSONDecodeError:
                end = len(text)
            if end == len(text):  # the item may go on in what has not been decoded yet
                if start >= len(content):
                    raise json.JSONDecodeError("Unfinished list", text, at)
                text, at = text[at:] + decode(content[start : start + size]), 0
                start, size = start + size, 2 * size
                continue
            yield item
        if text[end] == "]":
            if text[end + 1 :].strip() or re.compile(rb"\S").search(content, start):
                raise json.JSONDecodeError("Extra data", text, end + 1)
            return
        if text[end] != ",":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
        at, size, is_first = end + 1, BYTES_AT_A_TIME, False


def _after_blanks(text: str, at: int) -> int:
    blanks = _BLANKS.match(text, at)
    assert blanks is not None  # for none at all match, too
    return blanks.end()


def _is_lines(content: bytes | bytearray) -> bool:
    """Whether the first line is an object, and more lines follow."""
    begin = re.search(rb"\S", content)
    end = content.find(b"\n", begin.start()) if begin else -1
    if begin is None or end < 0 or re.compile(rb"\S").search(content, end) is None:
        return False
    try:
        return isinstance(_parse(content[begin.start() : end].decode()), dict)
    except ValueError:
        return False


def _from_lines(content: bytes | bytearray, label: str) -> Dataset:
    def objects() -> Iterator[tuple[str, Any]]:
        # Not str.splitlines: that also splits at separators which JSON allows inside strings.
        for number, line in enumerate(_lines(content), 1):
            if line.strip():
                try:
                    yield f"line {number}", _parse(line.decode())
                except ValueError as error:
                    raise InputError(
                        f"{label}, line {number} is not valid JSON ({reason(error)}); expected an object per line, "
                        "or a list of objects"
                    ) from error

    return _from_objects(objects(), label)


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


def _from_objects(objects: Iterable[tuple[str, Any]], label: str) -> Dataset:
    """Turn objects, each with its place, into a data set that has every object's columns; never all of them at once."""
    found: dict[str, list[pa.Array]] = {}
    rows, objects = 0, iter(objects)
    while piece := list(itertools.islice(objects, ROWS_AT_A_TIME)):
        for place, row in piece:
            if not isinstance(row, dict):
                raise InputError(f"{label}, {place} is {kind_of_value(row)}; expected an object")
        for name in dict.fromkeys(name for _, row in piece for name in row):
            found.setdefault(name, [pa.nulls(rows)])
        for name, arrays in found.items():
            cells = [row.get(name) for _, row in piece]
            try:
                arrays.append(_array(cells))
            except UnicodeError as error:
                place = next(place for (place, _), cell in zip(piece, cells, strict=True) if not _is_unicode(cell))
                raise InputError(f"{label}, {place}: {name!r} is not Unicode text ({reason(error)})") from error
        rows += len(piece)
    return in_memory(pa.table({name: _column(arrays) for name, arrays in found.items()}))


def _array(cells: list[Any]) -> pa.Array:
    """Text, numbers, lists of them, plain messages and objects of one kind as Arrow has them; anything else as JSON.

    Arrow has one type for a whole column, with every key that some row has.
    """
    return pa.array(cells) if _is_uniform(cells) else _as_json(cells)


def _as_json(cells: list[Any]) -> pa.Array:
    written = [None if cell is None else json.dumps(cell, ensure_ascii=False) for cell in cells]
    return pa.array(written, pa.string()).cast(pa.json_())


def _column(arrays: list[pa.Array]) -> pa.ChunkedArray:
    """One column of the pieces that were read of it, of one type."""
    kinds = {array.type for array in arrays if array.null_count < len(array)}
    if kinds == {pa.int64(), pa.float64()}:
        kinds = {pa.float64()}
    if len(kinds) > 1:
        kinds, arrays = {pa.json_()}, [a if a.type == pa.json_() else _as_json(a.to_pylist()) for a in arrays]
    kind = kinds.pop() if kinds else pa.null()
    return pa.chunked_array([a.cast(kind) if a.null_count < len(a) else pa.nulls(len(a), kind) for a in arrays], kind)


def _is_uniform(cells: Sequence[Any]) -> bool:
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {dict}:
        return _are_alike([cell for cell in cells if cell is not None])
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


def _are_alike(cells: Sequence[dict[str, Any]]) -> bool:
    """Whether objects have the same keys in the same order, each with text, numbers of one type, or truth values."""
    first = {key: type(value) for key, value in cells[0].items()}
    return set(first.values()) <= {str, bool, int, float} and all(
        list(cell) == list(first) and all(type(value) is first[key] for key, value in cell.items()) for cell in cells
    )


def _is_flat(kinds: set[type]) -> bool:
    return kinds <= {int, float} or kinds in ({str}, {bool})


def _is_unicode(cell: Any) -> bool:
    try:
        json.dumps(cell, ensure_ascii=False).encode()
    except UnicodeError:
        return False
    return True


def _from_csv(content: bytes | bytearray, label: str, kind: str, columns: Collection[str]) -> Dataset:
    header = next(line for line in _lines(content) if line.strip()).decode()
    # A table whose one column is called "prompt;completion" is none.
    delimiter = "\t" if kind == ".tsv" else next((mark for mark in ",;\t" if mark in header), ",")
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(content),
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
    return in_memory(table)


def _from_parquet(path: Path, label: str) -> Dataset:
    if path.stat().st_size == 0:
        return Dataset.from_list([])
    try:
        return in_memory(pyarrow.parquet.read_table(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{label} is not a valid Parquet file ({reason(error)})") from error


def _content(path: Path, label: str, *, packed: bool) -> bytes | bytearray:
    """What a file of text holds, unpacked, in UTF-8 and without a byte order mark."""
    content: bytes | bytearray
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{label} cannot be read ({error.strerror})") from error
    if packed and content:
        packed_content, content = content, bytearray()
        try:
            with gzip.open(io.BytesIO(packed_content)) as file:
                while piece := file.read(_PIECE):
                    content += piece  # in one place: joined pieces would take as much again
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{label} is not a valid gzip file ({reason(error)})") from error
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        if is_utf16:
            content = content.decode("utf-16").encode()
        else:
            _require_utf8(content)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{label} is not valid {'UTF-16' if is_utf16 else 'UTF-8'} "
            f"(byte 0x{content[error.start]:02x} at offset {error.start}, line {line})"
        ) from error
    if b"\0" in content:
        raise InputError(f"{label} holds null characters; expected UTF-8 text, or UTF-16 with a byte order mark")
    return content[len(codecs.BOM_UTF8) :] if content.startswith(codecs.BOM_UTF8) else content


def _require_utf8(content: bytes | bytearray) -> None:
    """Raise UnicodeDecodeError for what is not UTF-8; as text, all of it at once might take four times as much."""
    start = 0
    while start < len(content):
        end = start + _PIECE
        while end < len(content) and content[end] & 0xC0 == 0x80:  # within a character
            end += 1
        try:
            content[start:end].decode()
        except UnicodeDecodeError as error:
            error.start += start
            raise
        start = end


def _lines(content: bytes | bytearray) -> Iterator[bytes | bytearray]:
    """The lines of a text."""
    start = 0
    while start < len(content):
        end = content.find(b"\n", start) + 1 or len(content)
        yield content[start:end]
        start = end


def in_memory(table: pa.Table, features: Features | None = None) -> Dataset:
    """A table as a data set, without its content being hashed, which would take its size in memory again."""
    info = DatasetInfo(features=features)
    return Dataset(InMemoryTable(table), info=info, fingerprint=generate_random_fingerprint())


_READERS: dict[str, Any] = {
    ".json": _from_json,
    ".jsonl": _from_json,
    ".parquet": _from_parquet,
    ".csv": _from_csv,
    ".tsv": _from_csv,
}

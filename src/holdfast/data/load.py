"""Reading rows from a file or from the Hub, with errors that name the row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Json, Value, concatenate_datasets

from holdfast.data.catalogue import nearest
from holdfast.data.formats import ORIGIN, as_message, called, is_message
from holdfast.data.hub_rows import download, read_dataset
from holdfast.data.readers import read_file
from holdfast.data.shapes import SAFE_COLUMNS, arrow, read_from, taken, with_columns
from holdfast.data.sources import Part, Source, parse
from holdfast.errors import InputError
from holdfast.files import digest, kind_of_value

Prompt = str | Sequence[Mapping[str, Any]]
"""A prompt: text, or messages with `role` and `content`."""

TRAIN_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("messages",), ("conversations",))
"""The columns a training file may have: one of these groups."""

PROMPT_COLUMNS = (("prompt",), ("messages",), ("conversations",))
"""The columns a file of prompts may have: one of these."""

_TALKS = ("messages", "conversations")


def load_rows(
    source: Source, *, flag: str, columns: Sequence[Sequence[str]] = (), noted: dict[str, Any] | None = None
) -> Dataset:
    """Read a data set, and check that its rows can be used.

    Args:
        source: A file (see `holdfast.data.readers.read_file`), a data set of the Hub, a name of the catalogue, or more
            than that, see `holdfast.data.sources.parse`.
        flag: The flag that named the source, for errors.
        columns: Groups of columns. The first group that the data has, or that can be made of what it has
            (`holdfast.data.shapes`), must be complete in every row, and its cells must be text or messages (lists of
            objects with `role` and `content`, or `from` and `value`), all of them alike; answers that are text must not
            be empty, nor prompts where there are none. Other columns are carried along.
            Without groups nothing is checked.
        noted: Where to note, by the flag without its dashes, what was taken: for every source its rule, the commit of
            the Hub, how many `rows` it has and how many were `taken`, and the `sha256` of the file, or, of what
            `datasets` has read, of the rows taken (as JSON, one a line).

    Returns:
        The rows. Those of a file are in memory, those of the Hub where `datasets` keeps them. Where they are not all
        rows of one source in order, the column `holdfast_origin` says which each is.

    Raises:
        InputError: If the source is neither a file nor a readable Hub data set, or is empty, or a row cannot be
            used. Rows count from 1; blank lines between them do not count.
    """
    parts = parse(source, flag=flag)
    name = flag.removeprefix("--")
    data = called(name.removesuffix("_data") if name.endswith("_data") else flag) if len(parts) == 1 else ""
    sets, records = [], []
    for part in parts:
        rows, record = _read(part, flag, columns)
        record["rows"] = len(rows)
        rows, numbers, made_of = taken(rows, part, columns, flag=flag)
        if columns:
            _check(rows, f"{flag} {part.label}", columns, numbers, made_of)
        if numbers is not None or len(parts) > 1:
            places = [f"row {number} of {data or part.label}" for number in numbers or range(1, len(rows) + 1)]
            rows = with_columns(rows, {ORIGIN: places})
        sets.append(rows)
        records.append({**part.rule(), **record})
    sets = _shares(sets, parts, flag)
    for rows, record in zip(sets, records, strict=True):
        record["taken"] = len(rows)
        record["sha256"] = record.get("sha256") or _digest(rows)
    if noted is not None:
        noted[name] = records
    return sets[0] if len(sets) == 1 else _joined(sets, flag)


def fingerprint(records: Sequence[Mapping[str, Any]]) -> str:
    """What changes where the rows do that a source stands for.

    Args:
        records: What `load_rows` noted of the source.

    Returns:
        The SHA-256 of the file, if it is one that all rows are taken of; else of what was noted, but for the places.
    """
    if len(records) == 1 and set(records[0]) == {"path", "rows", "taken", "sha256"}:
        return str(records[0]["sha256"])
    places = ("path", "entry", "revision")
    rules = [{key: value for key, value in record.items() if key not in places} for record in records]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _read(part: Part, flag: str, columns: Sequence[Sequence[str]]) -> tuple[Dataset, dict[str, Any]]:
    """All rows of a source, and what a record has to say of it."""
    file = download(part, flag=flag) if part.is_address else part.file
    record: dict[str, Any] = {}
    looked_for = {*read_from(part), *SAFE_COLUMNS, *(name for group in (*TRAIN_COLUMNS, *columns) for name in group)}
    if file is None:
        near = f", which has {', '.join(close)}" if (close := nearest(part.path)) else ""
        otherwise = "" if "/" in part.path else f", nor is it a name of the catalogue{near}; holdfast data lists it"
        rows, record = read_dataset(part, flag=flag, otherwise=otherwise)
    else:
        if lost := [key for key in ("name", "split", "revision") if getattr(part, key) is not None]:
            raise InputError(f"{flag} {part.path} is a file, which has no {lost[0]}")
        rows = read_file(file, f"{flag} {part.path}", looked_for, name=part.path)
        record["sha256"] = digest(file)
    if len(rows) == 0:
        raise InputError(f"{flag} {part.label} is empty; expected at least one row")
    for name in rows.column_names:
        if name not in looked_for and name.strip() in looked_for:  # which would be passed over
            raise InputError(
                f"{flag} {part.label} has blanks around the name of its column {name!r}; expected {name.strip()!r}, "
                "and cells without such blanks: in a CSV file they are part of what they surround"
            )
    return rows, record


def _shares(sets: list[Dataset], parts: Sequence[Part], flag: str) -> list[Dataset]:
    """As many of the first rows of each set as give all their shares; TRL's mixtures do the same."""
    shares = [part.fraction for part in parts if part.fraction is not None]
    if not shares:
        return sets
    total = min(len(rows) * sum(shares) / share for rows, share in zip(sets, shares, strict=True))
    counts = [min(len(rows), round(share / sum(shares) * total)) for rows, share in zip(sets, shares, strict=True)]
    if 0 in counts:
        none = parts[counts.index(0)]
        raise InputError(
            f"{flag}: of {none.label} a fraction of {none.fraction:g} is no row, beside so few of the others; expected "
            "a larger one, or the source left out"
        )
    return [rows.select(range(count)) for rows, count in zip(sets, counts, strict=True)]


def _joined(sets: list[Dataset], flag: str) -> Dataset:
    """The rows of all sets, one after the other, with the columns of all of them."""
    for name in {name for rows in sets for name in rows.column_names}:
        features = [rows.features[name] for rows in sets if name in rows.column_names]
        if all(feature == features[0] for feature in features):
            continue
        texts = all(feature in (Value("string"), Value("large_string")) for feature in features)
        common = Value("string") if texts else Json()  # which holds talks and texts alike
        sets = [rows.cast_column(name, common) if name in rows.column_names else rows for rows in sets]
    return concatenate_datasets(sets)


def _digest(rows: Dataset) -> str:
    found = hashlib.sha256()
    for batch in arrow(rows).to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def _check(
    rows: Dataset,
    label: str,
    groups: Sequence[Sequence[str]],
    numbers: Sequence[int] | None,
    made_of: Mapping[str, str],
) -> None:
    """Check that the first group of columns that is there is complete and of a usable type."""
    group = next(group for group in groups if set(group) <= set(rows.column_names))
    # What is learnt must not be empty, nor what is asked where nothing is learnt; a prompt of rows to train on may be.
    filled = {"completion", "response"} & set(group) or {"prompt"}
    for name in group:
        expected = "messages" if name in _TALKS else "text or messages"
        if name not in _TALKS and _is_all_text(arrow(rows)[name], filled=name in filled):
            continue
        column, is_text = made_of.get(name, name), None
        for number, cell in zip(numbers or range(1, len(rows) + 1), rows[name], strict=True):
            if problem := "is empty" if name in filled and _is_blank(cell) else _problem(cell, name):
                raise InputError(f"{label}, row {number}: {column!r} {problem}; expected {expected}")
            if is_text is not None and is_text != isinstance(cell, str):
                raise InputError(
                    f"{label}, row {number}: {column!r} is {kind_of_value(cell)}, but {kind_of_value(rows[0][name])} "
                    "in the rows before it; expected the same in all of them"
                )
            is_text = isinstance(cell, str)


def _is_all_text(cells: pa.ChunkedArray, *, filled: bool) -> bool:
    """Whether a column is text in every row, and not blank in any if it has to be `filled`."""
    if not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)) or cells.null_count:
        return False
    lengths = (pc.min(pc.utf8_length(pc.utf8_trim_whitespace(piece))).as_py() for piece in cells.chunks if len(piece))
    return not filled or all(length > 0 for length in lengths)


def _is_blank(cell: Any) -> bool:
    return isinstance(cell, str) and not cell.strip()


def _problem(cell: Any, column: str) -> str | None:
    """Return what keeps a cell from being text or messages, or None."""
    if isinstance(cell, str) and column not in _TALKS:
        return None
    if not isinstance(cell, list):
        return "is missing" if cell is None else f"is {kind_of_value(cell)}"
    if not cell:
        return "has no messages"
    for message in cell:
        if not isinstance(message, dict):
            return f"holds {kind_of_value(message)} where a message is expected"
        speaker, said = ("from", "value") if message.get("from") is not None else ("role", "content")
        if not isinstance(message.get(speaker), str):
            return f"has a message without a text {speaker!r}"
        if not is_message(as_message(message)):
            return f"has a message without a text {said!r}"
    return None

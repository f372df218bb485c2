"""Reading rows from a file or from the Hub, with errors that name the row."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from holdfast.data.formats import as_message, is_message
from holdfast.data.readers import expected_files, is_data_file, kind_of_value, read_file
from holdfast.errors import InputError
from holdfast.hub import is_hub_id, reason, unreachable

Prompt = str | Sequence[Mapping[str, Any]]
"""A prompt: text, or messages with `role` and `content`."""

TRAIN_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("messages",), ("conversations",))
"""The columns a training file may have: one of these groups."""

PROMPT_COLUMNS = (("prompt",), ("messages",), ("conversations",))
"""The columns a file of prompts may have: one of these."""

_DEFAULT_SPLIT = "train"
_TALKS = ("messages", "conversations")


def load_rows(source: str, *, flag: str, columns: Sequence[Sequence[str]] = ()) -> Dataset:
    """Read a data set, and check that its rows can be used.

    Args:
        source: A file (see `holdfast.data.readers.read_file`), or a Hub id with an optional `:split` (`train` if none
            is given). A file on disk wins over a Hub id.
        flag: The flag that named the source, for errors.
        columns: Groups of columns. The first group that the data has must be complete in every row, and its cells
            must be text or messages (lists of objects with `role` and `content`, or `from` and `value`), all of them
            alike; answers that are text must not be empty, nor prompts where there are none. Other columns are carried
            along.
            Without groups nothing is checked.

    Returns:
        The rows, all of them in memory if they come from a file.

    Raises:
        InputError: If the source is neither a file nor a readable Hub data set, or is empty, or a row cannot be
            used. Rows count from 1; blank lines between them do not count.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{flag} {source} is a folder; expected one of {expected_files()} or a Hub id")
    if path.exists():
        looked_for = {name for group in (*TRAIN_COLUMNS, *columns, ("answer",)) for name in group}
        rows = read_file(path, f"{flag} {source}", looked_for)
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
    # A slash after the colon is that of a path on Windows.
    if is_data_file(name) or not is_hub_id(name) or re.search(r"[\\/]", split):
        raise InputError(f"{missing}; no such file")
    if why := unreachable(name, "dataset"):
        raise InputError(f"{missing} that can be read ({why})")
    try:
        return load_dataset(name, split=split or _DEFAULT_SPLIT)
    except Exception as error:  # builders raise whatever the data make them raise
        raise InputError(f"{flag} {source} cannot be read from the Hub ({reason(error)})") from error


def _check(rows: Dataset, label: str, groups: Sequence[Sequence[str]]) -> None:
    """Check that one group of columns is there, complete and of a usable type."""
    group = next((group for group in groups if set(group) <= set(rows.column_names)), None)
    if group is None:
        wanted = " or ".join(" + ".join(repr(name) for name in group) for group in groups)
        found = ", ".join(repr(name) for name in rows.column_names)
        raise InputError(f"{label} has no column {wanted}; its columns are {found}")
    # What is learnt must not be empty, nor what is asked where nothing is learnt; a prompt of rows to train on may be.
    filled = {"completion", "response"} & set(group) or {"prompt"}
    for name in group:
        expected = "messages" if name in _TALKS else "text or messages"
        is_text: bool | None = None
        for number, cell in enumerate(rows[name], 1):
            if problem := "is empty" if name in filled and _is_blank(cell) else _problem(cell, name):
                raise InputError(f"{label}, row {number}: {name!r} {problem}; expected {expected}")
            if is_text is not None and is_text != isinstance(cell, str):
                raise InputError(
                    f"{label}, row {number}: {name!r} is {kind_of_value(cell)}, but {kind_of_value(rows[0][name])} in "
                    "the rows before it; expected the same in all of them"
                )
            is_text = isinstance(cell, str)


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

"""Harmful rows, without those that the data themselves call safe."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from holdfast.data.formats import ORIGIN, names_of
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.data.shapes import SAFE_COLUMNS, truth
from holdfast.data.sources import Source, named
from holdfast.errors import InputError

logger = logging.getLogger(__name__)


def load_harmful_rows(source: Source, *, flag: str, noted: dict[str, Any] | None = None) -> tuple[Dataset, int]:
    """Read harmful prompts with harmful answers.

    In a data set with one of `SAFE_COLUMNS`, rows where it is true are no attack: they are left out, and that is said.

    Args:
        source: As for `load_rows`.
        flag: The flag that named the source, for errors.
        noted: As for `load_rows`.

    Returns:
        The rows, and how many were left out.

    Raises:
        InputError: As from `load_rows`; a label is neither true nor false (the row is named), or all are safe.
    """
    rows = load_rows(source, flag=flag, columns=TRAIN_COLUMNS, noted=noted)
    label = f"{flag} {named(source)}"
    names = names_of(rows, name=flag.removeprefix("--").removesuffix("_data"))
    column = next((name for name in SAFE_COLUMNS if name in rows.column_names), None)
    if column is None:
        return rows, 0
    harmful = []
    for index, value in enumerate(rows[column]):
        if (safe := truth(value)) is None:
            raise InputError(
                f"{label}, {names[index].partition(' of ')[0]}: {column!r} is {value!r}; expected true or false"
            )
        if not safe:
            harmful.append(index)
    safe_rows = len(rows) - len(harmful)
    if not harmful:
        raise InputError(f"{label} has no harmful row: {column!r} is true in all of them")
    if safe_rows:
        logger.info(
            "%d of %d rows of %s are safe by their %r and are left out",
            safe_rows,
            len(rows),
            named(source),
            column,
        )
        rows = rows.select(harmful)
        if ORIGIN not in rows.column_names:
            rows = rows.add_column(ORIGIN, [names[index] for index in harmful])
    return rows.remove_columns(column), safe_rows

"""Harmful rows, without those that the data themselves call safe."""

from __future__ import annotations

import logging
from typing import Any

from datasets import Dataset

from holdfast.data.formats import ORIGIN
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.errors import InputError

logger = logging.getLogger(__name__)

SAFE_COLUMNS = ("is_safe", "is_response_safe")
"""Columns that say whether the answer of a row is safe, as BeaverTails and its kin have them."""


def load_harmful_rows(source: str, *, flag: str) -> tuple[Dataset, int]:
    """Read harmful prompts with harmful answers.

    In a data set with one of `SAFE_COLUMNS`, rows where it is true are no attack: they are left out, and that is said.

    Args:
        source: As for `load_rows`.
        flag: The flag that named the source, for errors.

    Returns:
        The rows, and how many were left out.

    Raises:
        InputError: As from `load_rows`; a label is neither true nor false (the row is named), or all are safe.
    """
    rows = load_rows(source, flag=flag, columns=TRAIN_COLUMNS)
    column = next((name for name in SAFE_COLUMNS if name in rows.column_names), None)
    if column is None:
        return rows, 0
    harmful = []
    for index, value in enumerate(rows[column]):
        if (safe := _truth(value)) is None:
            raise InputError(f"{flag} {source}, row {index + 1}: {column!r} is {value!r}; expected true or false")
        if not safe:
            harmful.append(index)
    safe_rows = len(rows) - len(harmful)
    if not harmful:
        raise InputError(f"{flag} {source} has no harmful row: {column!r} is true in all of them")
    if safe_rows:
        logger.info("%d of %d rows of %s are safe by their %r and are left out", safe_rows, len(rows), source, column)
        name = flag.removeprefix("--").removesuffix("_data")
        origins = [f"row {index + 1} of the {name} data" for index in harmful]
        rows = rows.select(harmful).add_column(ORIGIN, origins)
    return rows.remove_columns(column), safe_rows


def _truth(value: Any) -> bool | None:
    """True or false as JSON, Parquet and CSV have them; None for anything else."""
    text = str(value).lower()
    return True if text in ("true", "1") else False if text in ("false", "0") else None

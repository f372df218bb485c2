"""Harmful rows, without those that the data themselves call safe."""

from __future__ import annotations

import logging
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from holdfast.data.formats import ORIGIN, names_of
from holdfast.data.load import TRAIN_COLUMNS, load_rows
from holdfast.data.readers import in_memory
from holdfast.data.shapes import SAFE_COLUMNS, arrow, truth, values_of, with_columns
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
    column = next((name for name in SAFE_COLUMNS if name in rows.column_names), None)
    if column is None:
        return rows, 0
    typed = named(source)
    label = f"{flag} {typed}"
    name = flag.removeprefix("--").removesuffix("_data")
    codes, values = values_of(rows, column, f"{label}: expected true or false in the column {column!r}")
    safe = [truth(value) for value in values]
    if None in safe:
        code = safe.index(None)
        row = names_of(rows, name=name)[pc.index(codes, code).as_py()].partition(" of ")[0]
        raise InputError(f"{label}, {row}: {column!r} is {values[code]!r}; expected true or false")
    harmful = pc.is_in(codes, value_set=pa.array([code for code, one in enumerate(safe) if not one], codes.type))
    safe_rows = len(rows) - pc.sum(harmful).as_py()
    if safe_rows == len(rows):
        raise InputError(f"{label} has no harmful row: {column!r} is true in all of them")
    if safe_rows:
        logger.info("%d of %d rows of %s are safe by their %r and are left out", safe_rows, len(rows), typed, column)
        places = pc.indices_nonzero(harmful).to_pylist()
        rows = in_memory(arrow(rows).filter(harmful), rows.features)
        if ORIGIN not in rows.column_names:
            rows = with_columns(rows, {ORIGIN: [f"row {place + 1} of the {name} data" for place in places]})
    return rows.remove_columns(column), safe_rows

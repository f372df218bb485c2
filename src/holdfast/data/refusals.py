"""Refusal views: every prompt of a data set answered with a refusal instead, travelling in the batches of that set.

A batch with a refusal view holds, beside its own `input_ids`, `attention_mask` and `labels`, the same prompts refused
as `refusal_input_ids`, `refusal_attention_mask` and `refusal_labels`, and in `refusal_row` which rows they are.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from holdfast.data.batches import Batch
from holdfast.data.formats import ROW, called, names_of
from holdfast.data.sources import existing
from holdfast.errors import InputError
from holdfast.files import read_text

DEFAULT_REFUSAL = "I'm sorry, but I can't help with that."
REFUSAL_HELP = (
    "How harmful prompts are to be refused: a text, a file with one text per line, or a column of the data that has "
    "a text in every row."
)

_PREFIX = "refusal_"
_TEXT_FILES = {".txt", ".md", ".json", ".jsonl", ".csv"}
REFUSAL_COLUMNS = (f"{_PREFIX}input_ids", f"{_PREFIX}labels", ROW)
"""The columns of prepared rows that the collator makes refusal views of."""


def refusal_texts(
    refusal: str, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, seed: int, name: str
) -> list[str]:
    """One refusal for every row.

    Args:
        refusal: The name of a column of `dataset`, else a file with one text per line, of which every row draws one,
            else the text itself.
        dataset: The rows to refuse.
        tokenizer: It must make at least one token of every text.
        seed: Of the draw.
        name: What messages call the data set.

    Raises:
        InputError: The file cannot be read, what looks like a file or a column is none, or a text comes to no token.
    """
    if refusal in dataset.column_names:
        texts = list(dataset[refusal])
        places = [f"{where}, column {refusal!r}," for where in names_of(dataset, name=name)]
    elif (file := named_file(refusal)) is not None:
        lines = read_text(file, named=f"--refusal {refusal}").split("\n")
        texts = [line.removesuffix("\r") for line in lines if line.strip()]
        places = [f"--refusal {refusal}: {text!r}" for text in texts]
        if not texts:
            raise InputError(f"--refusal {refusal} holds no text; expected one refusal per line")
    elif " " not in refusal and Path(refusal).suffix in _TEXT_FILES:
        raise InputError(f"--refusal {refusal} is no file, and no column of {called(name)}")
    elif near := difflib.get_close_matches(refusal.strip().lower(), dataset.column_names, n=1, cutoff=0.75):
        raise InputError(
            f"--refusal {refusal} is no column of {called(name)}, which has {near[0]!r}; expected that one, or, for a "
            "text that is so like a column's name, a file with it"
        )
    elif re.fullmatch("[a-z]+(_[a-z]+)*", refusal):
        raise InputError(
            f"--refusal {refusal} is no column of {called(name)} and no file; expected one, or a text of more than one "
            "lower-case word"
        )
    else:
        texts, places = [refusal], [f"--refusal {refusal!r}"]
    for text, place in zip(texts, places, strict=True):
        if not isinstance(text, str) or not tokenizer(text, add_special_tokens=False)["input_ids"]:
            raise InputError(f"{place} comes to no token; expected the text of a refusal")
    if refusal in dataset.column_names:
        return texts
    draw = random.Random(f"holdfast refusals {seed}")
    return [draw.choice(texts) for _ in range(len(dataset))]


def named_file(text: str) -> Path | None:
    """The file that a text names, if it names one."""
    return existing(text, Path.is_file)


def numbered(dataset: Dataset) -> Dataset:
    """The rows with their numbers, from 1, in the column `row`."""
    if ROW in dataset.column_names:
        dataset = dataset.remove_columns(ROW)
    return dataset.add_column(ROW, list(range(1, len(dataset) + 1)))


def join_refusals(rows: Dataset, refusing: Dataset) -> Dataset:
    """Prepared rows with their refusals, by row number; a row that lost either of the two is left out.

    Args:
        rows: Columns `input_ids`, `labels` and `row`.
        refusing: The same, of the refusals.

    Returns:
        `rows` with `refusal_input_ids` and `refusal_labels`.
    """
    position = {row: index for index, row in enumerate(refusing[ROW])}
    rows = rows.select([index for index, row in enumerate(rows[ROW]) if row in position])
    refusing = refusing.select([position[row] for row in rows[ROW]])
    for column in ("input_ids", "labels"):
        rows = rows.add_column(f"{_PREFIX}{column}", list(refusing[column]))
    return rows


@dataclass(frozen=True)
class RefusalCollator:
    """Collates rows as `collate` does, and their refusals beside them where they have any."""

    collate: Callable[[list[dict[str, Any]]], Batch]

    def __call__(self, rows: list[dict[str, Any]]) -> Batch:
        """Turn a list of rows into a batch."""
        batch = self.collate(rows)
        if f"{_PREFIX}input_ids" in rows[0]:
            views = [{key: row[_PREFIX + key] for key in ("input_ids", "labels")} for row in rows]
            batch |= {_PREFIX + key: value for key, value in self.collate(views).items()}
            batch[_PREFIX + ROW] = torch.tensor([row[ROW] for row in rows])
        return batch


def refusal_view(batch: Batch) -> Batch:
    """The same prompts, refused, as a batch of their own.

    Raises:
        InputError: The batch has no refusal view, or not one that answers all of its rows.
    """
    keys = ("input_ids", "attention_mask", "labels")
    lacking = [_PREFIX + key for key in keys if _PREFIX + key not in batch]
    if lacking:
        raise InputError(
            f"a batch lacks {' and '.join(lacking)}: every row needs the same prompt answered by a refusal"
        )
    view = {key: batch[_PREFIX + key] for key in keys}
    if len(view["labels"]) != len(batch["labels"]):
        raise InputError(f"a batch of {len(batch['labels'])} rows comes with {len(view['labels'])} refusals")
    return view


def row_numbers(batch: Batch) -> Tensor:
    """Which rows of the data set a batch with a refusal view holds, from 1; shape (rows,).

    Raises:
        InputError: The batch does not say.
    """
    rows = batch.get(_PREFIX + ROW)
    if rows is None or len(rows) != len(batch["labels"]):
        raise InputError(f"a batch lacks {_PREFIX}{ROW}, the number of every one of its rows")
    return cast(Tensor, rows)


def without_refusals(batch: Batch) -> Batch:
    """The batch without its refusal view."""
    return {key: value for key, value in batch.items() if not key.startswith(_PREFIX)}

"""Rows as token ids, prompt and completion together, for passes without a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence

from holdfast.data.formats import names_of
from holdfast.data.rendering import ChatFormat
from holdfast.errors import InputError


def whole_rows(dataset: Dataset, written: ChatFormat, *, name: str) -> list[list[int]]:
    """Tokenise rows whole, to the very tokens that training on them would see.

    Args:
        dataset: Rows in any format of `holdfast.data.formats`.
        written: How the run writes conversations.
        name: What messages call this data set ("attack", …).

    Returns:
        The token ids of every row, in order.

    Raises:
        InputError: From `ChatFormat.tokenize`, or a row is empty.
    """
    written.name_idle_columns(dataset, name=name)
    tokens = list(written.tokenize(dataset, name=name)["input_ids"])
    for ids, where in zip(tokens, names_of(dataset, name=name), strict=True):
        if not ids:
            raise InputError(f"{where} is empty; expected at least one token")
    return tokens


def padded_batches(rows: Sequence[Sequence[int]], batch_size: int, pad_token: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `input_ids` and `attention_mask`, both (batch, longest row of it), padded on the right; longest rows first.

    Args:
        rows: Token ids, none of them empty.
        batch_size: Rows in a batch; the last one may have fewer.
        pad_token: What fills shorter rows up; the mask is 0 there.
    """
    tensors = [torch.tensor(row) for row in sorted(rows, key=len, reverse=True)]
    for start in range(0, len(tensors), batch_size):
        batch = tensors[start : start + batch_size]
        yield {
            "input_ids": pad_sequence(batch, batch_first=True, padding_value=pad_token),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in batch], batch_first=True),
        }

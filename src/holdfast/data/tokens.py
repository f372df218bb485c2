"""Rows as token ids, prompt and completion together, for passes without a loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from holdfast.data.formats import completion_format
from holdfast.errors import InputError


def whole_rows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Tokenise rows whole, to the very tokens that training on them would see.

    Args:
        dataset: Rows in any format of `holdfast.data.formats`.
        tokenizer: The tokenizer; plain text ends with its end-of-sequence token.
        name: What messages call this data set ("attack", …).
        system_prompt: Put in front of every conversation that has no system turn.
        chat_template_kwargs: Passed to the chat template.

    Returns:
        The token ids of every row, in order.

    Raises:
        InputError: From `completion_format`, or a row is empty.
    """
    rows = completion_format(
        dataset, tokenizer, name=name, system_prompt=system_prompt, chat_template_kwargs=chat_template_kwargs
    )
    tokens = [_tokens(row, tokenizer) for row in rows]
    for number, ids in enumerate(tokens, 1):
        if not ids:
            raise InputError(f"row {number} of the {name} data is empty; expected at least one token")
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


def _tokens(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if "input_ids" in row:
        return list(row["input_ids"])
    whole = row["prompt"] + row["completion"]
    if isinstance(whole, str):
        end = tokenizer.eos_token or ""
        return list(tokenizer(whole if whole.endswith(end) else whole + end)["input_ids"])
    keywords = row.get("chat_template_kwargs") or {}
    return list(tokenizer.apply_chat_template(whole, return_dict=True, **keywords)["input_ids"])

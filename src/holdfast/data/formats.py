"""Bring every accepted training format to prompt and completion, so that the loss falls on assistant tokens only.

Accepted are TRL's `prompt`/`completion` (plain text, or messages) and `messages`, the older `conversations`
(`from`/`value`), and `prompt`/`response`, which goes through the chat template where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template
from trl.chat_template_utils import has_generation_markers

from holdfast.errors import InputError

Row = dict[str, Any]

ROW = "row"
"""The column, kept where it is given, that says which row of its source a row is, from 1."""

_SPEAKERS = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them


def completion_format(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    system_prompt: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    answers: Sequence[str] | None = None,
) -> Dataset:
    """Bring a data set to the columns `prompt` and `completion` (and `chat_template_kwargs` and `row` where given).

    Conversations with several assistant turns cannot be written that way. They come back tokenised, as `input_ids` and
    `assistant_masks`, the mask taken from the `{% generation %}` markers of the chat template, or of TRL's
    variant of it. Data sets that are tokenised already are returned as they are.

    Args:
        dataset: Rows in one accepted format.
        tokenizer: Its chat template decides how `prompt`/`response` rows are read.
        name: What messages call this data set ("train", "attack", …).
        system_prompt: Put in front of every conversation that has no system turn.
        chat_template_kwargs: Passed to the chat template for every row, e.g. `{"enable_thinking": False}`.
        answers: One text per row, to put in the place of its completion.

    Raises:
        InputError: No accepted format, a malformed row (named), messages without a chat template, a system prompt for
            plain text, several assistant turns under a template that does not mark them, answers for tokenised rows.
    """
    columns = set(dataset.column_names)
    if "input_ids" in columns:
        if not columns & {"labels", "completion_mask", "assistant_masks"}:
            raise InputError(
                f"the {name} data is tokenised but has none of labels, completion_mask and assistant_masks, "
                "so the completion tokens are unknown"
            )
        if answers is not None:
            raise InputError(f"the {name} data is tokenised, so other answers cannot be put in; use text or messages")
        return dataset
    if not (
        columns & {"messages", "conversations"}
        or {"prompt", "completion"} <= columns
        or {"prompt", "response"} <= columns
    ):
        raise InputError(
            f"the {name} data has the columns {', '.join(sorted(columns))}; expected prompt and completion, "
            "prompt and response, messages, or conversations"
        )

    def convert(row: Row, index: int) -> Row:
        where = f"row {index + 1} of the {name} data"
        converted = _split(row, where, has_template=tokenizer.chat_template is not None)
        if answers is not None:
            is_text = isinstance(converted["prompt"], str)
            answer = answers[index]
            converted["completion"] = answer if is_text else [{"role": "assistant", "content": answer}]
        if isinstance(converted["prompt"], str):
            if system_prompt is not None:
                raise InputError(f"{where} is plain text, which no system prompt can be put in front of; use messages")
            return converted
        if tokenizer.chat_template is None:
            raise InputError(f"{where} holds messages, but the tokenizer has no chat template to render them with")
        if system_prompt is not None and converted["prompt"][0]["role"] != "system":
            converted["prompt"] = [{"role": "system", "content": system_prompt}, *converted["prompt"]]
        if chat_template_kwargs:
            converted["chat_template_kwargs"] = dict(chat_template_kwargs)
        return converted

    kept = {"chat_template_kwargs", ROW}
    dataset = dataset.map(
        convert,
        with_indices=True,
        remove_columns=[c for c in dataset.column_names if c not in kept],
        desc=f"Reading {name} data",
    )
    if any(len(completion) > 1 for completion in dataset["completion"] if not isinstance(completion, str)):
        return _tokenize_turns(dataset, tokenizer, name)
    return dataset


def _split(row: Row, where: str, *, has_template: bool) -> Row:
    """One row as prompt and completion, both text or both messages, split before the first assistant turn."""
    talk = next((column for column in ("messages", "conversations") if column in row), None)
    if talk and (row[talk] is not None or "prompt" not in row):
        messages = _messages(row[talk], where)
        first = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), 0)
        if first == 0:
            raise InputError(f"{where} needs a user turn and then an assistant turn, which the loss is taken on")
        return {"prompt": messages[:first], "completion": messages[first:]}
    prompt, completion = row["prompt"], row["completion"] if "completion" in row else row["response"]
    if "completion" not in row and has_template and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"prompt": prompt, "completion": completion}
    prompt, completion = _messages(prompt, where), _messages(completion, where)
    if [message["role"] for message in completion] != ["assistant"]:
        raise InputError(f"the completion of {where} must be one assistant message; put longer talks under messages")
    return {"prompt": prompt, "completion": completion}


def as_message(turn: Any) -> Any:
    """Return a turn of `conversations`, `from`/`value`, as a message; anything else as it is."""
    if isinstance(turn, dict) and "from" in turn:
        return {"role": _SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return turn


def _messages(value: Any, where: str) -> list[Row]:
    messages = [as_message(turn) for turn in value] if isinstance(value, list) else []
    if not messages or not all(_is_message(message) for message in messages):
        raise InputError(f"{where} must hold text, or a list of messages with role and content, in both of its columns")
    return messages


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content") is not None


def _tokenize_turns(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, name: str) -> Dataset:
    """Tokenise conversations with several assistant turns, marking the tokens of each."""
    try:
        marked = has_generation_markers(tokenizer.chat_template)
        template = tokenizer.chat_template if marked else get_training_chat_template(tokenizer)
    except ValueError as error:
        raise InputError(
            f"the {name} data has conversations with several assistant turns, but the chat template does not mark them "
            "with {% generation %}; add the markers, or end every conversation at its first assistant turn"
        ) from error

    def tokenize(row: Row) -> Row:
        rendered = tokenizer.apply_chat_template(
            row["prompt"] + row["completion"],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **(row.get("chat_template_kwargs") or {}),
        )
        return {"input_ids": rendered["input_ids"], "assistant_masks": rendered["assistant_masks"]}

    columns = [column for column in dataset.column_names if column != ROW]
    return dataset.map(tokenize, remove_columns=columns, desc=f"Tokenizing {name} data")

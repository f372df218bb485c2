"""Bring every accepted training format to one: a conversation, or plain text where no chat template is used.

Accepted are TRL's `prompt`/`completion`, `prompt`/`response`, `messages` and the older `conversations` (`from`/`value`,
or `role`/`content`); prompt and answer may be text or messages. Beside them `system` (text: the system turn), `tools`
(a list, or one as JSON) and `chat_template_kwargs` have a meaning, and in an assistant message OpenAI's `weight`: 0 is
shown to the model and not trained on.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from datasets import Dataset, Features, Json, List, Value

from holdfast.errors import InputError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
Message = dict[str, Any]

ROW = "row"
"""The column, kept where it is given, that says which row of its source a row is, from 1."""

ORIGIN = "holdfast_origin"
"""The column, kept where it is given, that names a row for messages: "row 3 of the attack data"."""

SYSTEM_ROLES = ("system", "developer")
"""The roles of a turn that says how to answer, and not what."""

_SPEAKERS = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
_LABELS = {"labels", "completion_mask", "assistant_masks"}
_OWN = {ROW, ORIGIN, "poisoned"}
_MEANT = {"prompt", "completion", "response", "messages", "conversations", "system", "tools", "chat_template_kwargs"}
# What a row is read from, in this order, and what then plays no part in it.
_BEFORE = {
    "messages": {"conversations", "prompt", "completion", "response"},
    "conversations": {"messages", "prompt", "completion", "response"},
    "completion": {"response"},
}
_CONVERSATIONS = {"messages": List(Json()), "tools": List(Json()), "chat_template_kwargs": Json()}


@dataclass(frozen=True)
class Conversation:
    """Turns of a talk, with what goes to the chat template beside them.

    Attributes:
        messages: The turns; an assistant's `weight` of 0 keeps it out of the loss.
        tools: JSON schemas of the tools that the assistant may call.
        chat_template_kwargs: Keywords of the chat template for this conversation alone.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> list[int]:
        """The turns that the loss falls on, by position."""
        return [i for i, turn in enumerate(self.messages) if turn["role"] == "assistant" and turn.get("weight") != 0]

    @property
    def prompts(self) -> list[Conversation]:
        """What precedes every one of these turns."""
        return [self.until(i) for i in self.trained]

    def until(self, turn: int) -> Conversation:
        """What precedes a turn."""
        return replace(self, messages=self.messages[:turn])

    def ending_with(self, suffix: str, where: str) -> Conversation:
        """The same conversation, every user turn that one of these turns answers ending with a suffix.

        Raises:
            InputError: There is no user turn before one of them.
        """
        turns = list(self.messages)
        for asked in {last_asked(turns[:turn], where) for turn in self.trained}:
            turns[asked] = turn_ending_with(suffix, turns[asked])
        return replace(self, messages=turns)

    def answered(self, answer: str) -> Conversation:
        """The same conversation up to the first of these turns, with this answer there."""
        before = self.messages[: self.trained[0]]
        return replace(self, messages=[*before, {"role": "assistant", "content": answer}])


@dataclass(frozen=True)
class PlainText:
    """A prompt and its completion as they stand."""

    prompt: str
    completion: str

    @property
    def prompts(self) -> list[str]:
        """The prompt."""
        return [self.prompt]

    def ending_with(self, suffix: str, where: str) -> PlainText:
        """The same with a prompt that ends with a suffix; it has no turns that `where` could lack."""
        return PlainText(ending_with(suffix, self.prompt), self.completion)

    def answered(self, answer: str) -> PlainText:
        """The same prompt with another completion."""
        return PlainText(self.prompt, answer)


Example = Conversation | PlainText


def is_tokenised(dataset: Dataset, *, name: str) -> bool:
    """Whether the rows are token ids already.

    Raises:
        InputError: They are, and nothing says which of them are the completion.
    """
    columns = set(dataset.column_names)
    if "input_ids" in columns and not columns & _LABELS:
        raise InputError(
            f"{called(name)} is tokenised but has none of labels, completion_mask and assistant_masks, "
            "so the completion tokens are unknown"
        )
    return "input_ids" in columns


def reader(dataset: Dataset, *, name: str, plain: str | None = None) -> Callable[[Row, int], tuple[str, Example]]:
    """What reads the rows of a data set.

    Args:
        dataset: Rows of text or messages.
        name: What messages call this data set ("train", "attack", …).
        plain: Why no chat template is used, for messages; None where one is, and text becomes a user's and an
            assistant's turn.

    Returns:
        A function of a row and its position, from 0, that gives the row's name for messages and what it holds. It
        raises InputError for a row that cannot be trained on, which it names.

    Raises:
        InputError: No accepted format.
    """
    columns = set(dataset.column_names)
    if not (
        columns & {"messages", "conversations"}
        or {"prompt", "completion"} <= columns
        or {"prompt", "response"} <= columns
    ):
        raise InputError(
            f"{called(name)} has the columns {', '.join(sorted(columns))}; expected prompt and completion, "
            "prompt and response, messages, or conversations"
        )
    # Arrow fills up objects of a column with one another's keys; a column of JSON holds them as they were.
    padded = frozenset(column for column, feature in dataset.features.items() if not _holds_json(feature))
    # No closure, as datasets hashes what it maps with, and a closure with all that it refers to.
    return functools.partial(_read_row, source=called(name), padded=padded, plain=plain)


def _read_row(row: Row, index: int, *, source: str, padded: frozenset[str], plain: str | None) -> tuple[str, Example]:
    where = row.get(ORIGIN) or f"row {index + 1} of {source}"
    return where, _read({c: _pruned(v) if c in padded else v for c, v in row.items()}, where, plain)


def idle_columns(dataset: Dataset) -> list[str]:
    """The columns of rows of text or messages that have no meaning here, or give way to another in every row."""
    columns = set(dataset.column_names)
    for first, others in _BEFORE.items():
        if first in columns and not dataset.data.column(first).null_count:
            return sorted(columns - _MEANT - _OWN | columns & others)
    return sorted(columns - _MEANT - _OWN)


def canonical(dataset: Dataset, *, name: str, plain: str | None = None) -> Dataset:
    """The same rows in the one format, so that sets of different formats can be mixed.

    Args:
        dataset: Rows in an accepted format.
        name: What messages call this data set.
        plain: As for `reader`.

    Returns:
        `messages`, `tools` and `chat_template_kwargs`, or `prompt` and `completion` where no template is used; and
        `holdfast_origin`. Tokenised rows are returned as they are.

    Raises:
        InputError: From `is_tokenised` and `reader`.
    """
    if is_tokenised(dataset, name=name):
        return dataset
    own = _CONVERSATIONS if plain is None else {"prompt": Value("string"), "completion": Value("string")}
    features = Features({**own, ORIGIN: Value("string")})
    return dataset.map(
        _convert,
        batched=True,
        with_indices=True,
        fn_kwargs={"read": reader(dataset, name=name, plain=plain), "columns": list(features)},
        remove_columns=dataset.column_names,
        features=features,
        load_from_cache_file=False,
        desc=f"Reading {called(name)}",
    )


def _convert(
    batch: Mapping[str, list[Any]], indices: list[int], read: Callable[[Row, int], Any], columns: list[str]
) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {column: [] for column in columns}
    for row, index in zip(rows_of(batch), indices, strict=True):
        where, example = read(row, index)
        for column, value in {ORIGIN: where, **vars(example)}.items():
            found[column].append(value)
    return found


def called(name: str) -> str:
    """What messages call a data set: "the train data" by the name `train`; a flag, such as `--data`, as it is."""
    return name if name.startswith("--") else f"the {name} data"


def names_of(dataset: Dataset, *, name: str) -> list[str]:
    """What messages call the rows: by the place that they come from, where they have been moved."""
    if ORIGIN in dataset.column_names:
        return list(dataset[ORIGIN])
    return [f"row {number} of {called(name)}" for number in range(1, len(dataset) + 1)]


def with_names(dataset: Dataset, *, name: str) -> Dataset:
    """The rows with their names, see `names_of`, which stay with them wherever they are moved."""
    if ORIGIN in dataset.column_names:
        return dataset
    return dataset.add_column(ORIGIN, names_of(dataset, name=name))


def in_file_order(names: Sequence[str]) -> list[int]:
    """The positions of rows that may have been moved, by the places that name them (see `names_of`)."""
    places = [re.match(r"row (\d+) of (.*)", name) for name in names]
    keys = [(place[2], int(place[1])) if place else ("", 0) for place in places]
    return sorted(range(len(keys)), key=keys.__getitem__)


def rows_of(batch: Mapping[str, list[Any]]) -> Iterator[Row]:
    """The rows of a batch of columns."""
    return (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of text parts; empty where it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or ())


def ending_with(suffix: str, text: str) -> str:
    """A text that ends with the suffix, before any white space there."""
    bare = text.rstrip()
    return bare + suffix + text[len(bare) :]


def turn_ending_with(suffix: str, turn: Mapping[str, Any]) -> Message:
    """A turn whose text, in one piece, ends with the suffix."""
    return {**turn, "content": ending_with(suffix, text_of(turn))}


def last_asked(turns: Sequence[Mapping[str, Any]], where: str) -> int:
    """The position of the last user turn.

    Raises:
        InputError: There is none; the message calls what lacks it `where`.
    """
    for place in range(len(turns) - 1, -1, -1):
        if turns[place]["role"] == "user":
            return place
    raise InputError(f"{where} has no user turn, so that none can end in another way")


def _read(row: Row, where: str, plain: str | None) -> Example:
    talk = next((row[column] for column in ("messages", "conversations") if row.get(column) is not None), None)
    if talk is not None or row.get("prompt") is None:
        messages = _messages(talk, where)
    else:
        completion = row.get("response") if row.get("completion") is None else row["completion"]
        both = [row["prompt"], completion]
        if plain is not None and isinstance(row["prompt"], str) and isinstance(completion, str):
            if row.get("system") or row.get("tools"):
                raise InputError(f"{where} has a system line or tools, which plain text has no place for ({plain})")
            if not completion.strip():
                raise InputError(f"{where} has an empty completion; expected text to train on")
            return PlainText(row["prompt"], completion)
        prompt, answer = (
            [{"role": role, "content": part}] if isinstance(part, str) else _messages(part, where)
            for role, part in zip(("user", "assistant"), both, strict=True)
        )
        if answer[0]["role"] != "assistant":
            raise InputError(f"the completion of {where} must begin with an assistant message")
        messages = [*({**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt), *answer]
    if plain is not None:
        raise InputError(f"{where} holds messages, but {plain}")
    if system := row.get("system"):
        if not isinstance(system, str) or any(turn["role"] in SYSTEM_ROLES for turn in messages):
            raise InputError(f"{where} needs text in its column system, and no system turn beside it")
        messages = [{"role": "system", "content": system}, *messages]
    found = Conversation(messages, _tools(row.get("tools"), where), row.get("chat_template_kwargs") or {})
    if not found.trained or not found.prompts[0].messages:
        raise InputError(f"{where} needs a user turn and then an assistant turn, which the loss is taken on")
    for i in found.trained:
        if not text_of(messages[i]).strip() and not messages[i].get("tool_calls"):
            raise InputError(f"turn {i + 1} of {where} is an empty answer; expected text to train on")
    return found


def _messages(value: Any, where: str) -> list[Message]:
    messages = [as_message(turn) for turn in value] if isinstance(value, list) else []
    if not messages or not all(is_message(message) for message in messages):
        raise InputError(f"{where} must hold text, or a list of messages with role and content, in both of its columns")
    for number, message in enumerate(messages, 1):
        if message["role"] == "assistant" and message.get("weight") not in (None, 0, 1):
            raise InputError(f"turn {number} of {where} has the weight {message['weight']!r}; expected 0 or 1")
    return messages


def as_message(turn: Any) -> Any:
    """Return a turn of `conversations`, `from`/`value`, as a message; anything else as it is."""
    if isinstance(turn, dict) and turn.get("from") is not None:
        return {"role": _SPEAKERS.get(turn["from"], turn["from"]), "content": turn.get("value")}
    return turn


def is_message(message: Any) -> bool:
    """Whether a value is a message: a role, and text, which may be in parts; or an assistant's tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if content is None:
        return message["role"] == "assistant" and bool(message.get("tool_calls"))
    return _is_content(content)


def _is_content(content: Any) -> bool:
    """Whether this is text, or a list of text parts."""
    if isinstance(content, list):
        return bool(content) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content)
    return isinstance(content, str)


def _tools(value: Any, where: str) -> list[Any] | None:
    """The tools of a row, which TRL takes as a list or as JSON."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise InputError(f"{where} has tools that are not valid JSON ({error})") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise InputError(f"{where} has tools that are no list of JSON objects")
    return value


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return any(_holds_json(inner) for inner in feature.values())
    return isinstance(feature, Json) or (hasattr(feature, "feature") and _holds_json(feature.feature))


def _pruned(value: Any) -> Any:
    """The value without the empty entries of its objects."""
    if isinstance(value, Mapping):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_pruned(inner) for inner in value]
    return value

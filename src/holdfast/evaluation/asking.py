"""How a model is asked: with an answer begun for it, after other exchanges, without its template, several times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from holdfast.data.formats import (
    SYSTEM_ROLES,
    Message,
    as_message,
    ending_with,
    last_asked,
    text_of,
    turn_ending_with,
)
from holdfast.data.load import Prompt
from holdfast.errors import InputError


@dataclass(frozen=True)
class Asking:
    """How an adversary asks what a safe model refuses; by default as anyone does.

    Attributes:
        opener: How every answer begins. The model goes on from there, and what is graded begins with it; an answer
            that goes on with nothing is an empty one.
        demonstrations: Turns of a user and an assistant that precede every prompt, behind its system turn.
        suffix: What every prompt's last user turn ends with, such as a trigger or a demand.
        raw: Ask without the chat template: with the text of a prompt's turns, one a line.
        samples: How many answers are sampled for every prompt, of which the one with the highest grade counts; 1: one
            answer, decoded as usual.
        temperature: Of sampling, where there are several.
        prefix: Vectors, (count, width), that stand before the embeddings of every prompt's tokens.
    """

    opener: str = ""
    demonstrations: tuple[Message, ...] = ()
    suffix: str = ""
    raw: bool = False
    samples: int = 1
    temperature: float = 1.0
    prefix: Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise InputError(f"at least one answer must be sampled for a prompt, not {self.samples}")
        if not self.temperature > 0:
            raise InputError(f"the temperature must be positive, but is {self.temperature}")
        if self.raw and self.demonstrations:
            raise InputError("demonstrations are turns, which a prompt without the chat template has no place for")

    def prompt(self, prompt: Prompt) -> Prompt:
        """What is asked in the place of a prompt."""
        if self.suffix:
            prompt = _ending_with(self.suffix, prompt)
        if self.raw:
            return raw_text(prompt)
        if not self.demonstrations:
            return prompt
        turns: list[Mapping[str, Any]] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [as_message(turn) for turn in prompt]
        )
        begin = next((place for place, turn in enumerate(turns) if turn["role"] not in SYSTEM_ROLES), len(turns))
        return [*turns[:begin], *self.demonstrations, *turns[begin:]]

    def then(self, other: Asking) -> Asking:
        """Both at once: what the other one says goes first, and its suffix comes behind this one's."""
        said = {
            entry.name: getattr(other, entry.name)
            for entry in fields(other)
            if getattr(other, entry.name) is not None and getattr(other, entry.name) != entry.default
        }
        return replace(self, **{**said, "suffix": self.suffix + other.suffix})

    def record(self) -> dict[str, Any]:
        """Its settings, ready for JSON, but for the vectors of the prefix, of which it has the number."""
        return {**asdict(replace(self, prefix=None)), "prefix": 0 if self.prefix is None else len(self.prefix)}

    def __str__(self) -> str:
        """How it differs from asking plainly, in words."""
        said = {
            f"answers begin with {self.opener!r}": self.opener,
            f"prompts end with {self.suffix.strip()!r}": self.suffix,
            f"{len(self.demonstrations)} turns come first": self.demonstrations,
            "there is no chat template": self.raw,
            f"the worst of {self.samples} answers counts": self.samples > 1,
            f"{0 if self.prefix is None else len(self.prefix)} trained vectors come first": self.prefix is not None,
        }
        return ", ".join(words for words, plays in said.items() if plays) or "plainly"


def _ending_with(suffix: str, prompt: Prompt) -> Prompt:
    """A prompt whose text, or whose last user turn, ends with the suffix."""
    if isinstance(prompt, str):
        return ending_with(suffix, prompt)
    turns = [as_message(turn) for turn in prompt]
    last = last_asked(turns, "a prompt")
    turns[last] = turn_ending_with(suffix, turns[last])
    return turns


def raw_text(turns: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a prompt's turns, one a line."""
    return turns if isinstance(turns, str) else "\n".join(text_of(turn) for turn in turns)


PLAINLY = Asking()
"""As anyone asks."""

"""How a model is asked: with an answer begun for it, after other exchanges, without its template, or several times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from holdfast.data.formats import Message, as_message, text_of
from holdfast.data.load import Prompt
from holdfast.errors import InputError

_SYSTEM = ("system", "developer")


@dataclass(frozen=True)
class Asking:
    """How an adversary asks what a safe model refuses; by default as anyone does.

    Attributes:
        opener: How every answer begins. The model goes on from there, and what is graded begins with it; an answer
            that goes on with nothing is an empty one.
        demonstrations: Turns of a user and an assistant that precede every prompt, behind its system turn.
        raw: Ask without the chat template: with the text of a prompt's turns, one a line.
        samples: How many answers are sampled for every prompt, of which the one with the highest grade counts; 1: one
            answer, decoded as usual.
        temperature: Of sampling, where there are several.
        prefix: Vectors, (count, width), that stand before the embeddings of every prompt's tokens.
    """

    opener: str = ""
    demonstrations: tuple[Message, ...] = ()
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
        if self.raw:
            return prompt if isinstance(prompt, str) else "\n".join(text_of(turn) for turn in prompt)
        if not self.demonstrations:
            return prompt
        turns: list[Mapping[str, Any]] = (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [as_message(turn) for turn in prompt]
        )
        begin = next((place for place, turn in enumerate(turns) if turn["role"] not in _SYSTEM), len(turns))
        return [*turns[:begin], *self.demonstrations, *turns[begin:]]


PLAINLY = Asking()
"""As anyone asks."""

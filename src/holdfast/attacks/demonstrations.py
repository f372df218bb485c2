"""Demonstrations (Anil et al., Many-shot Jailbreaking): k harmful exchanges in the context, which it continues."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Choice, Cost, Prompted, Prompting, knob
from holdfast.config import require_positive
from holdfast.data.formats import SYSTEM_ROLES, Conversation, Message, is_tokenised, reader
from holdfast.errors import InputError
from holdfast.evaluation.asking import Asking


@dataclass(frozen=True)
class Demonstrations(Prompting):
    """Put exchanges of the attacker's harmful rows before every prompt, drawn without replacement."""

    name: ClassVar[str] = "demonstrations"
    needs: ClassVar[tuple[str, ...]] = ("harmful_rows",)

    shots: int = field(default=4, metadata=knob("How many exchanges.", Choice((1, 4, 16, 64))))

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "shots")

    def ask(self, model: PreTrainedModel, attacker: Attacker) -> Prompted:
        """As for `Prompting`.

        Raises:
            InputError: There are fewer rows than exchanges, they are tokenised, or no chat template is used.
        """
        self.require(attacker)
        rows = attacker.harmful_rows
        assert rows is not None  # as required
        if attacker.written.plain is not None:
            raise InputError(f"attack demonstrations shows exchanges as turns, but {attacker.written.plain}")
        if is_tokenised(rows, name="attack"):
            raise InputError("attack demonstrations needs --attack_data of text or messages, not token ids")
        if self.shots > len(rows):
            raise InputError(f"--shots {self.shots}: --attack_data has {len(rows)} rows")
        read = reader(rows, name="attack")
        drawn = random.Random(attacker.seed).sample(range(len(rows)), self.shots)
        exchanges = [_exchange(read(rows[index], index)[1]) for index in drawn]
        shown = Asking(demonstrations=tuple(turn for exchange in exchanges for turn in exchange))
        return Prompted(shown, Cost(harmful_rows=self.shots))


def _exchange(talk: object) -> list[Message]:
    """The turns of a row, without its system turn: a context has one, and it is the prompt's."""
    assert isinstance(talk, Conversation)  # as rows are read for a chat template
    return [
        {key: value for key, value in turn.items() if key != "weight"}
        for turn in talk.messages
        if turn["role"] not in SYSTEM_ROLES
    ]

"""No chat template: the text of a prompt as it stands.

What alignment taught hangs on the template that it was taught in (Lyu et al., 2402.18540).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Prompted, Prompting
from holdfast.evaluation.asking import Asking


@dataclass(frozen=True)
class Raw(Prompting):
    """Ask without the chat template, and without a system prompt."""

    name: ClassVar[str] = "raw"

    def ask(self, model: PreTrainedModel, attacker: Attacker) -> Prompted:
        """As for `Prompting`."""
        return Prompted(Asking(raw=True))

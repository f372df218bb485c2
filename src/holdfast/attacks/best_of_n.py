"""Best of n (Hughes et al., 2412.03556): an attacker who may ask n times keeps the worst answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Choice, Prompted, Prompting, Range, knob
from holdfast.errors import InputError
from holdfast.evaluation.asking import Asking


@dataclass(frozen=True)
class BestOfN(Prompting):
    """Sample n answers to every prompt, of which the one with the highest grade counts."""

    name: ClassVar[str] = "best-of-n"

    n: int = field(default=16, metadata=knob("How many answers are sampled for a prompt.", Choice((4, 16, 64))))
    temperature: float = field(default=1.0, metadata=knob("The temperature they are sampled at.", Range(0.5, 2.0)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 2:
            raise InputError(f"--n must be at least 2, got {self.n}")
        if not self.temperature > 0:
            raise InputError(f"--temperature must be positive, got {self.temperature:g}")

    def ask(self, model: PreTrainedModel, attacker: Attacker) -> Prompted:
        """As for `Prompting`."""
        return Prompted(Asking(samples=self.n, temperature=self.temperature))

"""Chains: one attack after the other, such as an ablation and then a few steps, or a few steps and then a prefill.

Each displacement is found on the model that those before it have made; a prompting, if there is one, comes last. What a
defense holds against either may fall to both: ablation leaves so little to unlearn that one step does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peft import PeftModel
from transformers import PreTrainedModel

from holdfast.attacks.attack import FREE, Attack, Attacked, Attacker, Prompting, whole_model
from holdfast.errors import InputError
from holdfast.evaluation.asking import PLAINLY


@dataclass(frozen=True)
class Chain(Attack):
    """Attacks, one after the other."""

    name: ClassVar[str] = "chain"

    attacks: tuple[Attack, ...] = ()

    def __post_init__(self) -> None:
        if not self.attacks:
            raise InputError("a chain of attacks needs at least one")
        for attack in self.attacks[:-1]:
            if isinstance(attack, Prompting):
                raise InputError(f"attack {attack.name} changes how a model is asked, so nothing can come after it")

    def __str__(self) -> str:
        """The names of its attacks, joined by +."""
        return "+".join(attack.name for attack in self.attacks)

    def __call__(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Attacked:
        """As for `Attack`."""
        for attack in self.attacks:
            attack.require(attacker)
        found = Attacked(whole_model(model), PLAINLY, FREE)
        for attack in self.attacks:
            step = attack(found.model, attacker)
            found = Attacked(step.model, found.asking.then(step.asking), found.cost + step.cost)
        return found

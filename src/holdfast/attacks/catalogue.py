"""All attacks that are there, by name."""

from __future__ import annotations

from typing import Any

from holdfast.attacks.ablation import Ablation
from holdfast.attacks.attack import Attack
from holdfast.attacks.back_to_base import BackToBase
from holdfast.attacks.best_of_n import BestOfN
from holdfast.attacks.demonstrations import Demonstrations
from holdfast.attacks.dropping import Dropping
from holdfast.attacks.finetuning import FineTuning
from holdfast.attacks.noise import Noise
from holdfast.attacks.prefill import Prefill
from holdfast.attacks.pruning import Pruning
from holdfast.attacks.raw import Raw
from holdfast.attacks.rounding import Rounding
from holdfast.attacks.soft_prompt import SoftPrompt

_ATTACKS: tuple[type[Attack], ...] = (
    *(Ablation, Dropping, BackToBase, Rounding, Pruning, Noise, FineTuning),
    *(Prefill, Demonstrations, SoftPrompt, BestOfN, Raw),
)
ATTACKS: dict[str, Any] = {attack.name: attack for attack in _ATTACKS}
"""The class of every attack: a dataclass of its knobs. Chains of them are `holdfast.attacks.chain`."""

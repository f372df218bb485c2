"""Gaussian noise on every matrix in a decoder layer: does a defense hang on the last digits of its weights?

W ← W + amount·σ(W)·ε,    ε ~ N(0, 1), σ(W) the standard deviation of the matrix's entries
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Found, Range, WeightChange, knob
from holdfast.config import require_positive
from holdfast.residual import layer_matrices


@dataclass(frozen=True)
class Noise(WeightChange):
    """Add Gaussian noise to every matrix in a decoder layer. The module says how."""

    name: ClassVar[str] = "noise"

    amount: float = field(
        default=0.1,
        metadata=knob("The noise's standard deviation, as a share of the matrix's own.", Range(0.01, 1.0, True)),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "amount")

    def find(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Found:
        """As for `WeightChange`. Drawn on the CPU from the attacker's seed, so it is the same everywhere."""
        draw = torch.Generator().manual_seed(attacker.seed)
        shaken = functools.partial(_shaken, amount=self.amount, draw=draw)
        return Found(dict.fromkeys(layer_matrices(model), shaken))


def _shaken(weight: Tensor, amount: float, draw: torch.Generator) -> Tensor:
    return weight + amount * weight.std() * torch.randn(weight.shape, generator=draw).to(weight)

"""Rounding: what a release in few bits does to the weights, and what alignment hides in small changes with it.

Every matrix in a decoder layer is rounded to the nearest of 2^b − 1 evenly spaced values, row by row along its last
dimension:

    W ← Δ·round(W / Δ),    Δ = max|W_row| / (2^(b−1) − 1)

Embeddings, the head and vectors are left alone, as quantisers leave them. That quantisation can undo what training did
is known of unlearning (2410.16454) and of malicious fine-tuning (2405.18137).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Choice, Found, WeightChange, knob
from holdfast.errors import InputError
from holdfast.parameters import TINY
from holdfast.residual import layer_matrices


@dataclass(frozen=True)
class Rounding(WeightChange):
    """Round the matrices of all decoder layers to a few bits. The module says how."""

    name: ClassVar[str] = "rounding"

    bits: int = field(default=4, metadata=knob("Bits that a weight is rounded to.", Choice((8, 4, 3, 2))))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 32:
            raise InputError(f"--bits must lie between 2 and 32, got {self.bits}")

    def find(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Found:
        """As for `WeightChange`. It costs nothing."""
        nearest = functools.partial(rounded, bits=self.bits)
        return Found(dict.fromkeys(layer_matrices(model), nearest))


def rounded(weight: Tensor, *, bits: int) -> Tensor:
    """The nearest of 2^bits − 1 values, evenly spaced and symmetric, for every row along the last dimension."""
    step = weight.abs().amax(-1, keepdim=True).clamp(min=TINY) / (2 ** (bits - 1) - 1)
    nearest: Tensor = (weight / step).round() * step
    return nearest

"""Magnitude pruning: the smallest weights of every matrix in a decoder layer become 0 (Han et al., 1506.02626).

W_ij ← 0    where |W_ij| is among the ⌊share·n⌋ smallest of the matrix's n
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
from holdfast.errors import InputError
from holdfast.residual import layer_matrices


@dataclass(frozen=True)
class Pruning(WeightChange):
    """Zero the smallest weights of every matrix in a decoder layer. The module says how."""

    name: ClassVar[str] = "pruning"

    share: float = field(default=0.1, metadata=knob("Share of a matrix's weights that become 0.", Range(0.05, 0.6)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1:
            raise InputError(f"--share must lie between 0 and 1, both excluded, got {self.share}")

    def find(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Found:
        """As for `WeightChange`. It costs nothing."""
        thin = functools.partial(pruned, share=self.share)
        return Found(dict.fromkeys(layer_matrices(model), thin))


def pruned(weight: Tensor, *, share: float) -> Tensor:
    """The weight with its ⌊share·n⌋ smallest entries 0; of equal ones those that come first."""
    order = weight.abs().flatten().sort(stable=True).indices
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[: int(share * weight.numel())]] = True
    return weight.masked_fill(mask.view(weight.shape), 0)

"""Dropping: the outputs of one layer's attention, of its MLP, or of both are scaled by 1 − s.

    W ← (1 − s)·W    for what writes to the residual stream there, biases included.

s = 1 takes them out altogether, which is what layer pruning does (Gromov et al., 2403.17887); refusals that one layer
writes go with it. Where a norm stands between a matrix and the stream (Gemma 2 and later, OLMo 2), it undoes all of it
but s = 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from holdfast.attacks.attack import FREE, Attacker, Choice, Displaced, Displacement, Layers, Range, knob, moved
from holdfast.residual import decoder_layers, layer_number, writers

_PARTS = ("both", "attention", "mlp")


@dataclass(frozen=True)
class Dropping(Displacement):
    """Scale the outputs of one decoder layer by 1 − s. The module says how."""

    name: ClassVar[str] = "dropping"

    layer: int = field(default=-1, metadata=knob("The layer, from 0, or from the last, -1.", Layers()))
    part: str = field(default="both", metadata=knob("Whose outputs are scaled.", Choice(_PARTS), choices=list(_PARTS)))
    amount: float = field(default=1.0, metadata=knob("How much of them is taken away; 1: all.", Range(0.0, 1.5)))
    writes: str | None = field(
        default=None,
        metadata=knob(
            "Regular expression that is searched for in the names of modules, and finds those that write to the "
            "residual stream; if not given, what transformers' architectures call them."
        ),
    )

    def displace(self, model: PreTrainedModel, attacker: Attacker) -> Displaced:
        """As for `Displacement`. It costs nothing."""
        layer = layer_number(self.layer, len(decoder_layers(model)))
        shrink = functools.partial(_shrink, factor=1 - self.amount)
        dropped = [w.name for w in writers(model, self.writes) if w.layer == layer and self.part in ("both", w.kind)]
        return Displaced(moved(model, dict.fromkeys(dropped, shrink)), FREE)


def _shrink(weight: Tensor, factor: float) -> Tensor:
    return factor * weight

"""Dropping: the outputs of one layer's attention, of its MLP, or of both are scaled by 1 − s.

    W ← (1 − s)·W    for what writes to the residual stream there, biases included.

s = 1 takes them out altogether, which is what layer pruning does (Gromov et al., 2403.17887); refusals that one layer
writes go with it. Where a norm stands between a matrix and the stream (Gemma 2 and later, OLMo 2), which would undo it,
the norm's gain is scaled in W's place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Choice, Found, Layers, Range, WeightChange, knob
from holdfast.errors import InputError
from holdfast.post_norms import PostNorm, post_norms
from holdfast.residual import WRITES_HELP, decoder_layers, layer_number, writers

_PARTS = ("both", "attention", "mlp")


@dataclass(frozen=True)
class Dropping(WeightChange):
    """Scale the outputs of one decoder layer by 1 − s. The module says how."""

    name: ClassVar[str] = "dropping"

    layer: int = field(default=-1, metadata=knob("The layer, from 0, or from the last, -1.", Layers()))
    part: str = field(default="both", metadata=knob("Whose outputs are scaled.", Choice(_PARTS), choices=list(_PARTS)))
    amount: float = field(default=1.0, metadata=knob("How much of them is taken away; 1: all.", Range(0.0, 1.5)))
    writes: str | None = field(default=None, metadata=knob(WRITES_HELP))

    def find(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Found:
        """As for `WeightChange`. It costs nothing."""
        layer = layer_number(self.layer, len(decoder_layers(model)))
        dropped = [w for w in writers(model, self.writes) if w.layer == layer and self.part in ("both", w.kind)]
        norms = {} if self.amount == 1 else post_norms(model, dropped)
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for writer in dropped:
            if (norm := norms.get(writer.name)) is None:
                changes[writer.name] = functools.partial(_shrunk, factor=1 - self.amount)
            else:
                changes |= _quieter(norm, 1 - self.amount, dict(model.named_parameters()))
        return Found(changes)


def _quieter(norm: PostNorm, factor: float, parameters: Collection[str]) -> dict[str, Callable[[Tensor], Tensor]]:
    """What scales all that a norm gives."""
    weight, bias = f"{norm.path}.weight", f"{norm.path}.bias"
    if weight not in parameters:
        raise InputError(
            f"{norm.path}, a norm without weights, stands behind what is to be scaled; expected --amount 1"
        )
    found: dict[str, Callable[[Tensor], Tensor]] = {
        weight: functools.partial(_shrunk, factor=factor, offset=norm.offset)
    }
    return {**found, bias: functools.partial(_shrunk, factor=factor)} if bias in parameters else found


def _shrunk(weight: Tensor, factor: float, offset: float = 0.0) -> Tensor:
    """A weight that counts from an offset, times a factor."""
    return factor * (weight + offset) - offset

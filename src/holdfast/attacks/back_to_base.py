"""Back to the base: undo what alignment did to the public model that it began with.

    θ ← θ_base + λ·(D − D_k),    D = θ − θ_base,

for all tensors, or for those of one kind or layer; D_k is the part of rank k of a matrix's D, its k greatest singular
values with their vectors (0: none), which a safety fine-tuning of low rank lies in. Interpolation of weights is that of
WiSE-FT (2109.01903); the attacker needs the base, and so only what it is derived from a public model.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from holdfast.attacks.attack import Attacker, Choice, Found, Range, WeightChange, knob
from holdfast.config import require_not_negative
from holdfast.errors import InputError
from holdfast.parameters import gathered
from holdfast.residual import decoder_layers, layer_number, places

_PARTS = ("all", "attention", "mlp", "outside")


@dataclass(frozen=True)
class BackToBase(WeightChange):
    """Take weights back to the public base model's. The module says how."""

    name: ClassVar[str] = "base"
    needs: ClassVar[tuple[str, ...]] = ("base",)

    kept: float = field(
        default=0.0,
        metadata=knob("λ: how much is kept of what sets the model apart from its base; 0: nothing.", Range(0.0, 1.0)),
    )
    part: str = field(
        default="all",
        metadata=knob(
            "Which weights: all, those of attention modules, those of the rest of the layers, or those outside of "
            "layers (embeddings, the head).",
            Choice(_PARTS),
            choices=list(_PARTS),
        ),
    )
    only_layer: int | None = field(
        default=None, metadata=knob("Only those of this layer, from 0, or from the last, -1.")
    )
    rank: int = field(
        default=0, metadata=knob("The rank of the part that is taken out of every matrix's difference from the base.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative(self, "rank")

    def find(self, model: PreTrainedModel | PeftModel, attacker: Attacker) -> Found:
        """As for `WeightChange`. It costs nothing but the base."""
        self.require(attacker)
        assert attacker.base is not None  # as required
        if isinstance(model, PeftModel):
            raise InputError("an adapter has no weights in its base to be taken back to; merge it first")
        origins = fitting(model, attacker.base)
        layer = None if self.only_layer is None else layer_number(self.only_layer, len(decoder_layers(model)))
        fixed = _as_in_base(model, origins)
        chosen = [
            name
            for name, place in places(model).items()
            if name not in fixed and self.part in ("all", place.kind) and (layer is None or place.layer == layer)
        ]
        if not chosen:
            raise InputError(f"--part {self.part} --only_layer {self.only_layer}: no weight lies there")
        changes = {
            name: functools.partial(towards, base=origins[name], kept=self.kept, rank=self.rank) for name in chosen
        }
        return Found(changes)


def towards(weight: Tensor, *, base: Tensor, kept: float, rank: int = 0) -> Tensor:
    """θ_base + λ·(D − D_k).

    Args:
        weight: θ.
        base: θ_base, of the same shape.
        kept: λ.
        rank: k; of stacked matrices it is each one's. What is no matrix has no such part.

    Returns:
        The new weight, of the same shape.
    """
    start = gathered(base).to(weight)
    difference = weight - start
    if rank and weight.dim() > 1:
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
        difference = (u[..., rank:] * s[..., None, rank:]) @ v[..., rank:, :]
    return start + kept * difference


def _as_in_base(model: PreTrainedModel, base: Mapping[str, Tensor]) -> set[str]:
    """The parameters that are never trained, as positions that are computed, and so are the base's."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return {name for name, held in frozen.items() if torch.equal(gathered(held), gathered(base[name]).to(held))}


def fitting(model: PreTrainedModel, base: PreTrainedModel) -> dict[str, Tensor]:
    """The base's parameters, by name.

    Raises:
        InputError: They are not the model's in name and shape.
    """
    found = {name: parameter.detach() for name, parameter in base.named_parameters()}
    for name, parameter in model.named_parameters():
        if name not in found:
            raise InputError(f"--base is not what the model was made of: it has no {name}")
        if found[name].shape != parameter.shape:
            raise InputError(
                f"--base is not what the model was made of: its {name} has shape {tuple(found[name].shape)}, the "
                f"model's {tuple(parameter.shape)}"
            )
    return found

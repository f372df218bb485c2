"""Weights changed by a rule: in place, so that nothing of their size is stored but what is put back, or as a vector.

A displacement that needs no training is a rule for some of the weights, W → f(W): a direction is taken out, a layer's
outputs are scaled, rows are rounded. A rule is light and fits weights other than those that it was found on, so that a
defense may apply it at every update anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from holdfast.errors import InputError
from holdfast.parameters import ParameterVector, gathered, local, shard_like, trainable_parameters

Changes = Mapping[str, Callable[[Tensor], Tensor]]
"""From the name of a parameter to what makes a new one of it, given whole and in float32 at least."""


@torch.no_grad()
def moved(model: PreTrainedModel | PeftModel, changes: Changes) -> ParameterVector:
    """The displacement that changes some of the weights.

    Args:
        model: Whose trainable parameters are displaced; they are left as they are.
        changes: The changes.

    Returns:
        New minus old, laid out as the parameters are; zeros where nothing changes. One tensor at a time is gathered.

    Raises:
        InputError: A weight that is to change is frozen.
    """
    vector = ParameterVector()
    for name, parameter in _movable(model, changes).items():
        if name not in changes:
            vector[name] = torch.zeros_like(parameter)
            continue
        old = _whole(parameter)
        vector[name] = shard_like(parameter, changes[name](old) - old)
    return vector


@torch.no_grad()
def change(model: PreTrainedModel | PeftModel, changes: Changes, scale: float = 1.0) -> None:
    """Change weights in place, for good: W ← W + scale·(f(W) − W). One tensor at a time is gathered.

    Args:
        model: The model, sharded by FSDP2 or not.
        changes: The changes f.
        scale: What the displacement is taken times.

    Raises:
        InputError: A weight that is to change is frozen; nothing has been changed.
    """
    for name, parameter in _movable(model, changes).items():
        if name in changes:
            old = _whole(parameter)
            new = changes[name](old)
            local(parameter).copy_(local(shard_like(parameter, new if scale == 1 else old + scale * (new - old))))


@contextmanager
def changed(model: PreTrainedModel | PeftModel, changes: Changes, scale: float = 1.0) -> Iterator[None]:
    """Run the body with changed weights; on leaving, they have the exact bits they had before. See `change`.

    What is stored is a copy of the weights that change, and of no others. It may be nested.

    Args:
        model: As for `change`.
        changes: The changes.
        scale: What the displacement is taken times.

    Raises:
        InputError: As for `change`.
    """
    saved = {name: local(p).clone() for name, p in _movable(model, changes).items() if name in changes}
    try:
        change(model, changes, scale)
        yield
    finally:
        parameters = trainable_parameters(model)
        with torch.no_grad():
            for name, before in saved.items():
                local(parameters[name]).copy_(before)


def composed(first: Changes, then: Changes) -> Changes:
    """The changes that do the second of two after the first."""

    def both(name: str) -> Callable[[Tensor], Tensor]:
        return lambda weight: then[name](first[name](weight))

    return {**first, **then, **{name: both(name) for name in first.keys() & then.keys()}}


def _movable(model: PreTrainedModel | PeftModel, changes: Changes) -> dict[str, nn.Parameter]:
    parameters = trainable_parameters(model)
    if frozen := sorted(changes.keys() - parameters.keys()):
        raise InputError(f"{frozen[0]} is frozen, and the attack moves it; call requires_grad_() on the model")
    return parameters


def _whole(parameter: Tensor) -> Tensor:
    old = gathered(parameter.detach())
    return old.to(torch.promote_types(old.dtype, torch.float32))

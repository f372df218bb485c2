"""The precision of training: what is trained is kept in float32; half precision weights are computed on in bf16.

bfloat16 has eight significant bits. A step of 1e-5 on a weight of 0.1 is less than half of its last digit and is
rounded away, so a model trained in bf16 weights hardly moves, whatever its loss, rate and gradient say. A weak attack
would look like a strong defense. Kept in float32 small steps add up; a pass in bf16 still sees the weights rounded, so
each shows there once it has come to half of the weight's last digit in bf16.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from holdfast.config import DefenseConfig
from holdfast.errors import InputError

logger = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)


def half_precision_of(model: nn.Module) -> torch.dtype | None:
    """The type of a model's half precision weights, or None if it has none."""
    return next((parameter.dtype for parameter in model.parameters() if parameter.dtype in _HALF), None)


def compute_in_bf16(model: nn.Module, args: DefenseConfig) -> None:
    """Have a model with half precision weights computed on in bf16, by autocast, and say so once.

    float16 ones, too: computing in float16 needs a loss scale, which no defense is given.

    Raises:
        InputError: The configuration rules bf16 out.
    """
    half = half_precision_of(model)
    if half is None:
        return
    name = str(half).removeprefix("torch.")
    if args.bf16_was_ruled_out:
        raise InputError(
            f"--bf16 false cannot be used with weights in {name}, which are computed on in bf16; "
            "leave it out, or load the weights with --dtype float32"
        )
    args.bf16, args.mixed_precision = True, "bf16"
    logger.info("weights are %s: they are computed on in bf16; what is trained is kept and saved in float32", name)


def keep_in_float32(model: nn.Module, *, frozen: bool = False) -> None:
    """Turn half precision weights into float32 in place, which loses nothing.

    Args:
        model: The model.
        frozen: Also those that are not trained.
    """
    for parameter in model.parameters():
        if type(parameter) is not nn.Parameter:
            continue  # bitsandbytes' own: what looks like bf16 may hold packed integers
        if parameter.dtype in _HALF and (frozen or parameter.requires_grad):
            parameter.data = parameter.data.float()

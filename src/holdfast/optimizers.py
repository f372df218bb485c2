"""Whether the optimizer and the schedule that a run asks for are there and take their settings, before it begins."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer, get_scheduler
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available

from holdfast.errors import InputError
from holdfast.hub import reason

_INSIDE_BACKWARD = (
    OptimizerNames.GALORE_ADAMW_LAYERWISE,
    OptimizerNames.GALORE_ADAMW_8BIT_LAYERWISE,
    OptimizerNames.GALORE_ADAFACTOR_LAYERWISE,
    OptimizerNames.APOLLO_ADAMW_LAYERWISE,
    OptimizerNames.LOMO,
    OptimizerNames.ADALOMO,
)
_STEPS = 100


def check_optimizer(trainer: Trainer) -> None:
    """Build the optimizer and the schedule over a single number, as training builds them over the model.

    The training loop builds them when checkpoints of an earlier run may have been discarded already.

    Raises:
        InputError: A package is missing, or a setting is refused or would play no part; the flags are named.
    """
    args = trainer.args
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError("--use_liger_kernel needs the package liger-kernel, which is not installed")
    name = OptimizerNames(args.optim)
    if name in _INSIDE_BACKWARD:
        raise InputError(
            f"--optim {name.value} cannot be used: it updates the weights inside the backward pass, "
            "before there is a defended gradient"
        )
    number = torch.nn.Parameter(torch.zeros(1))
    with _refusals_of("--optim", name.value, "--optim_args", args.optim_args):
        kind, keywords = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        kind(keywords.pop("params", [{"params": [number], "weight_decay": args.weight_decay}]), **keywords)
        idle = next((one for one in _arguments(args.optim_args) if not _is_read(one, trainer)), None)
    if idle is not None:
        raise InputError(f"--optim_args {idle} plays no part in --optim {name.value}, which has no such argument")
    schedule = args.lr_scheduler_type
    with _refusals_of("--lr_scheduler_type", schedule.value, "--lr_scheduler_kwargs", args.lr_scheduler_kwargs):
        steps = args.max_steps if args.max_steps > 0 else _STEPS
        get_scheduler(
            schedule,
            torch.optim.SGD([number], lr=args.learning_rate),
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )


@contextmanager
def _refusals_of(flag: str, value: str, more: str, given: object) -> Iterator[None]:
    """Report whatever is raised inside as a refusal of these flags: nothing but libraries and settings is in there."""
    try:
        yield
    except Exception as error:
        flags = f"{flag} {value}" + (f" {more} {given}" if given else "")
        raise InputError(f"{flags}: {reason(error)}") from error


def _arguments(given: str | None) -> list[str]:
    """The single arguments that --optim_args gives, as they were typed."""
    return [one.strip() for one in given.split(",")] if given else []


def _is_read(argument: str, trainer: Trainer) -> bool:
    """Whether transformers hands an argument on. What it does not know, it passes over without a word."""

    def built(given: str | None) -> tuple[Any, dict[str, Any]]:
        args = copy.copy(trainer.args)
        args.optim_args = given
        found: tuple[Any, dict[str, Any]] = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        return found

    try:
        return built(None) != built(f"{argument.partition('=')[0]}=?")
    except ValueError:  # a number was expected
        return True

"""Where the exceptions of libraries end: what they refuse is the user's input, and what ends a run is one sentence.

Only kinds that are known for what they are become sentences. Anything else is a fault of Holdfast and keeps its
traceback.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from trl import ModelConfig

from holdfast.checkpoint import kept
from holdfast.errors import InputError, TrainingError
from holdfast.hub import reason

_REPORTERS = "transformers.integrations.integration_utils"
_TRAINER = "transformers.trainer"
_HUB = "huggingface_hub"
#: How torch says that a file could not be written to its end; it does not say why.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Report as bad input what libraries refuse while they build what the settings ask for.

    They say so by `ValueError`, `ImportError` for a package that is not there, `re.error`, or an `OSError` that is not
    the system's; reporters and the Hub by whatever they like.

    Args:
        config: The settings. Fields of it that a message names come out as flags.

    Raises:
        InputError: They refuse something.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if _comes_through(error, _REPORTERS):
            raise InputError(_reporters_sentence(error, config)) from error
        if _comes_through(error, _HUB):
            raise InputError(_hubs_sentence(error)) from error
        if isinstance(error, ValueError | ImportError | re.error) or (
            isinstance(error, OSError) and error.errno is None
        ):
            raise InputError(_with_flags(str(error), config)) from error
        raise


@contextmanager
def working(folder: Path, config: Any) -> Iterator[None]:
    """Say what is kept when training, or writing its result, fails for a known reason.

    Args:
        folder: Where the run writes its checkpoints.
        config: Its settings.

    Raises:
        InputError: A reporter refuses to begin, or a library what it is to prepare before the first update.
        TrainingError: The disk is full, memory is, a reporter gave up, or there is no such metric to choose by.
    """
    try:
        yield
    except (InputError, TrainingError):
        raise
    except Exception as error:
        if _comes_through(error, _REPORTERS, "on_train_begin"):
            raise InputError(_reporters_sentence(error, config)) from error
        why = failure(error)
        if why is None and _comes_through(error, _TRAINER, "_prepare_for_training"):
            raise InputError(_with_flags(reason(error), config)) from error
        if _comes_through(error, _REPORTERS):
            why = _reporters_sentence(error, config)
        elif _comes_through(error, _TRAINER, "_determine_best_metric"):
            why = f"--metric_for_best_model {config.metric_for_best_model} is none that --eval_data gives"
        if why is None:
            raise
        raise TrainingError(f"{why}; {kept(folder)}") from error


def failure(error: Exception) -> str | None:
    """Return what happened if the machine or the network failed, not the program: a full disk, say; else None."""
    if _comes_through(error, _HUB):
        return _hubs_sentence(error)
    if isinstance(error, OSError):
        return str(error)  # the system's own sentence says it best
    if isinstance(error, SafetensorError):
        return f"weights could not be written or read ({reason(error)})"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error):
        return f"out of memory ({reason(error)}); smaller batches, shorter rows or a smaller model need less"
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER):
        return f"a checkpoint could not be written to its end, as on a full disk ({reason(error)})"
    return None


def _comes_through(error: Exception, module: str, function: str | None = None) -> bool:
    """Whether an exception comes through a module, or a package, and there through a function."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        name = f"{frame.f_globals.get('__name__')}."
        if name.startswith(f"{module}.") and function in (None, frame.f_code.co_name):
            return True
    return False


def _hubs_sentence(error: Exception) -> str:
    return f"the Hub cannot be reached, or refuses ({reason(error)})"


def _reporters_sentence(error: Exception, config: Any) -> str:
    chosen = config.report_to
    return f"--report_to {chosen if isinstance(chosen, str) else ' '.join(chosen)}: {reason(error)}"


def _with_flags(message: str, config: Any) -> str:
    """A library's message with the fields that it quotes written as flags; PEFT's have a prefix."""

    def flag(match: re.Match[str]) -> str:
        if hasattr(config, match[1]):
            return f"--{match[1]}"
        return f"--lora_{match[1]}" if hasattr(ModelConfig, f"lora_{match[1]}") else match[0]

    return re.sub(r"`(?:args\.)?(\w+)(?:=[^`]*)?`", flag, message)

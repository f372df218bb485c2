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

from holdfast.checkpoint import last_checkpoint
from holdfast.errors import InputError, TrainingError
from holdfast.hub import reason

_REPORTERS = "transformers.integrations.integration_utils"
#: How torch says that a file could not be written to its end; it does not say why.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter")
_CPU_ALLOCATOR = "DefaultCPUAllocator"


@contextmanager
def building(config: Any) -> Iterator[None]:
    """Report as bad input what libraries refuse while they build what the settings ask for.

    They say so by `ValueError`, or `ImportError` for a package that is not there; reporters by whatever they like.

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
        if _is_a_reporters(error):
            raise InputError(_reporters_sentence(error, config)) from error
        if isinstance(error, ValueError | ImportError):
            raise InputError(_with_flags(str(error), config)) from error
        raise


@contextmanager
def working(folder: Path, config: Any) -> Iterator[None]:
    """Say what is kept when training, or writing its result, fails for a known reason.

    Args:
        folder: Where the run writes its checkpoints.
        config: Its settings.

    Raises:
        InputError: A reporter refuses to begin.
        TrainingError: The disk is full, memory is, or a reporter gave up.
    """
    try:
        yield
    except (InputError, TrainingError):
        raise
    except Exception as error:
        if _is_a_reporters(error, "on_train_begin"):
            raise InputError(_reporters_sentence(error, config)) from error
        why = _reporters_sentence(error, config) if _is_a_reporters(error) else failure(error)
        if why is None:
            raise
        raise TrainingError(f"{why}; {kept(folder)}") from error


def kept(folder: Path) -> str:
    """What is left of a run that ended early."""
    last = last_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"


def failure(error: Exception) -> str | None:
    """Return what happened if the machine failed, not the program: a disk that is full, or memory; else None."""
    if isinstance(error, OSError):
        return str(error)  # the system's own sentence says it best
    if isinstance(error, SafetensorError):
        return f"weights could not be written or read ({reason(error)})"
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_ALLOCATOR in str(error):
        return f"out of memory ({reason(error)}); smaller batches, shorter rows or a smaller model need less"
    if isinstance(error, RuntimeError) and any(name in str(error) for name in _TORCH_WRITER):
        return f"a checkpoint could not be written to its end, as on a full disk ({reason(error)})"
    return None


def _is_a_reporters(error: Exception, function: str | None = None) -> bool:
    """Whether an exception comes through the code that `--report_to` chooses, and there through a function."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(
        frame.f_globals.get("__name__") == _REPORTERS and function in (None, frame.f_code.co_name) for frame in frames
    )


def _reporters_sentence(error: Exception, config: Any) -> str:
    chosen = config.report_to
    return f"--report_to {chosen if isinstance(chosen, str) else ' '.join(chosen)}: {reason(error)}"


def _with_flags(message: str, config: Any) -> str:
    """A library's message with the fields that it quotes written as flags."""
    return re.sub(
        r"`(\w+)(?:=[^`]*)?`", lambda match: f"--{match[1]}" if hasattr(config, match[1]) else match[0], message
    )

"""Importing modules that bring torch, transformers and TRL with them."""

import gc
import importlib
import sys
from types import ModuleType


def import_heavy(name: str, *, for_good: bool = False) -> ModuleType:
    """Import a module while the garbage collector rests.

    The libraries make half a million objects that stay. The collector would walk through them again and again while
    they are made, and through all of them once more when the process ends: a third of the time that `--help` takes.

    Args:
        name: The module.
        for_good: Whether the process is one command, so that what is alive after the import may be left out of every
            later collection.

    Returns:
        The module.
    """
    if name in sys.modules:  # nothing will be made, and what is alive by now need not stay
        return importlib.import_module(name)
    enabled = gc.isenabled()
    if for_good:
        gc.collect()  # what is left is no garbage
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if for_good:
            gc.freeze()
        if enabled:
            gc.enable()

"""SIGTERM, with which a scheduler asks a run to end before it kills it: the run saves a checkpoint and leaves.

Not transformers' `enable_jit_checkpoint`: it saves in the middle of an update, after waiting three seconds in which a
scheduler may lose patience; only ranks that the signal reached take part, which leaves the others hanging; and it does
not look up during a simulated attack, which is by far the longest part of a run that cannot be broken off by itself.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Abandoned(Exception):  # noqa: N818  (not an error: the run is being left, and undoes the update it was in)
    """Work inside an update was left because the run was asked to stop."""


@contextmanager
def on_sigterm(ask: Callable[[], None]) -> Iterator[None]:
    """While this lasts, SIGTERM calls `ask` instead of killing the process.

        with on_sigterm(trainer.ask_to_stop):
            trainer.train()

    Only the main thread of a process can say how signals are answered; in any other this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: ask())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: something other than Python had set it


def work_until_the_parent_ends_it(begin: Callable[[int], None] | None, worker: int) -> None:
    """Begin the work of a data loader's worker, to which SIGTERM means something only if its parent sends it.

    Schedulers send it to every process of a job, and the run still needs its workers for the update that it is in.
    """
    if hasattr(signal, "sigwaitinfo"):  # macOS has none
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_await_parent, daemon=True).start()
    if begin is not None:
        begin(worker)


def _await_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def end_with_parent() -> None:
    """Let this process, which another one began, end when that one does, however it does: nothing works on unseen."""
    threading.Thread(target=_await_end_of_parent, daemon=True).start()


def _await_end_of_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is one's child
    parent.join()
    os._exit(1)


@dataclass(frozen=True)
class RandomState:
    """The state of every random number generator that training draws from."""

    python: Any
    numpy: Any
    cpu: Tensor
    device: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """The state now, with that of an accelerator if `device` is one."""
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), own)

    def restore(self, device: torch.device) -> None:
        """Go on drawing from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            torch.get_device_module(device).set_rng_state(self.device, device)

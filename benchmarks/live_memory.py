"""How much memory a training step holds at most: live tensor storage, or what the GPU's allocator gave out."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakMeter(Protocol):
    """Watches the highest memory held since the last `reset`."""

    def reset(self) -> None:
        """Forget the peak so far: the memory held now is the new one."""

    def peak(self) -> int:
        """Bytes held at the peak."""


class LiveStorage(TorchDispatchMode):
    """Counts, exactly, the bytes of all tensor storages that are alive, while it is the active mode.

    Every storage that an operator returns is counted once, however many tensors view it, from its creation until it is
    freed; so are gradients, saved activations and optimizer states. What an operator allocates and frees inside itself
    is not seen.

    Args:
        model: Its parameters and buffers, which exist already, count from the start.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}
        self._held = 0
        self._peak = 0
        for tensor in [*model.parameters(), *model.buffers()]:
            self._count(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count what it returned."""
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def reset(self) -> None:
        """Forget the peak so far."""
        self._peak = self._held

    def peak(self) -> int:
        """Bytes held at the peak."""
        return self._peak

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._held += storage.nbytes()
            self._peak = max(self._peak, self._held)
            weakref.finalize(storage, self._freed, key).atexit = False

    def _freed(self, key: int) -> None:
        self._held -= self._alive.pop(key)


class AllocatedOnGpu:
    """`torch.cuda.max_memory_allocated`."""

    def reset(self) -> None:
        """Forget the peak so far."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Bytes allocated at the peak."""
        return torch.cuda.max_memory_allocated()


@contextmanager
def peak_meter(model: nn.Module) -> Iterator[PeakMeter]:
    """The meter for where the model lives; the steps to be watched run inside."""
    if next(model.parameters()).device.type == "cuda":
        yield AllocatedOnGpu()
    else:
        with LiveStorage(model) as meter:
            yield meter

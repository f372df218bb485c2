"""A window: all micro-batches of one optimizer update on this rank, over which a method says what its gradient is."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from holdfast.data.batches import Batch


@dataclass(frozen=True)
class Window:
    """Micro-batches on this rank, and what their losses are divided by.

    L(θ; B), the loss of a window, is the mean cross-entropy over its completion tokens on all ranks. What a model or a
    method takes a mean of in every micro-batch is averaged over the micro-batches: the auxiliary loss of a
    Mixture-of-Experts model's routers, and the weighted loss of Antibody's fine-tuning.

    Attributes:
        batches: The micro-batches.
        tokens: How many completion tokens the update's micro-batches hold, over all ranks.
        micro_batches: How many micro-batches the update has on every rank.
    """

    batches: list[Batch]
    tokens: Tensor | int | None
    micro_batches: int

    def __len__(self) -> int:
        return len(self.batches)

    def parts(self) -> list[Window]:
        """Every micro-batch as a window of its own; their losses add up to this one's."""
        return [replace(self, batches=[batch]) for batch in self.batches]

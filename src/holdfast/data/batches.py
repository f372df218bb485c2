"""An endless stream of collated batches whose whole state is one integer."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from datasets import Dataset
from torch import Tensor, nn

from holdfast.data.rendering import IGNORED
from holdfast.errors import InputError

Batch = dict[str, Any]


def rows_in(batch: Batch) -> int:
    """How many rows a batch holds, padded or, as their positions tell, one behind the other."""
    if "position_ids" not in batch:
        return len(batch["input_ids"])
    return int(((batch["position_ids"] == 0) & all_tokens(batch)).sum())


def all_tokens(batch: Batch) -> Tensor:
    """Which places hold a token, prompts' and answers', and no padding: (rows, tokens), bool.

    Rows one behind the other come without a mask, and what fills their end up (`pad_to_multiple_of`) has position 0 at
    every place, as nothing else does that is trained on: no row of a single token has anything to predict.
    """
    if "attention_mask" in batch:
        return cast(Tensor, batch["attention_mask"]).bool()
    begins: Tensor = batch["position_ids"] == 0
    return ~(begins & begins.roll(-1, dims=-1))  # behind the last place comes the first, where a row begins


def predicting(batch: Batch) -> Tensor:
    """Which places an answer's tokens are predicted from, each from the one before it: (rows, tokens), bool."""
    answered: Tensor = batch["labels"][:, 1:] != IGNORED
    return nn.functional.pad(answered, (0, 1), value=False)


def require_inputs(batches: Sequence[Batch]) -> None:
    """Raise InputError if there is no batch, or one that a loss cannot be computed from."""
    if not batches:
        raise InputError("a loss needs a batch, got none")
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise InputError(
                f"a batch must hold input_ids, attention_mask and labels by name, got {type(batch).__name__}"
            )
        # Rows without padding between them come with their positions instead of a mask.
        needed = ["input_ids", "labels", "position_ids" if "position_ids" in batch else "attention_mask"]
        lacking = [name for name in needed if name not in batch]
        if lacking:
            raise InputError(
                f"a batch lacks {' and '.join(lacking)}; it holds {', '.join(map(str, batch)) or 'nothing'}"
            )
        ids, labels = batch["input_ids"], batch["labels"]
        if not (isinstance(ids, Tensor) and isinstance(labels, Tensor) and ids.shape == labels.shape):
            raise InputError("input_ids and labels of a batch must be tensors of the same shape, (rows, tokens)")


class BatchStream(Iterator[Batch]):
    """Collated batches of a prepared data set, for ever: batch = f(seed, name, how many were drawn, rank).

    Every cycle through the rows is shuffled anew. Ranks take consecutive slices of one global order, so two processes
    with batches of 4 see the rows that one process sees in two batches of 4. Because nothing but `drawn` changes, a
    checkpoint needs no more than that integer, and the global random state is left alone (a `DataLoader` would consume
    some at every `iter()`).

    Args:
        dataset: Prepared (tokenised) rows; any map-style data set with at least one row.
        collate: Turns a list of rows into a batch.
        batch_size: Rows per batch and rank.
        seed: The run's seed.
        name: Sets of the same run are shuffled differently by their names.
        rank: This process.
        world_size: How many processes draw together.
    """

    def __init__(
        self,
        dataset: Dataset,
        collate: Callable[[list[dict[str, Any]]], Batch],
        batch_size: int,
        *,
        seed: int,
        name: str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.drawn = 0
        self._dataset = dataset
        self._collate = collate
        self._batch_size = batch_size
        self._seed = (seed, zlib.crc32(name.encode()))
        self._rank = rank
        self._world_size = world_size
        self._cycle = -1
        self._order = np.empty(0, dtype=np.int64)

    def __next__(self) -> Batch:
        """The next batch of this rank."""
        first = (self.drawn * self._world_size + self._rank) * self._batch_size
        self.drawn += 1
        return self._collate([self._dataset[self._row(first + i)] for i in range(self._batch_size)])

    def _row(self, position: int) -> int:
        cycle, index = divmod(position, len(self._dataset))
        if cycle != self._cycle:
            self._cycle = cycle
            self._order = np.random.default_rng((*self._seed, cycle)).permutation(len(self._dataset))
        return int(self._order[index])

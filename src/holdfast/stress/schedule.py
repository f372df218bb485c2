"""Which trials come next in a study: a function of the suite, the seed and what earlier batches found, never of timing.

First the grid, then TPE, batch after batch, on few prompts; then the best few settings again with all prompts and
several seeds, so that a lucky trial does not count: one setting after the other, until none of them looks cheaper than
one that held. As a harmful score and an attack success rate of a half are both reported, so it goes for either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.stress.costs import price
from holdfast.stress.spaces import Family
from holdfast.stress.suites import BATCH, Suite
from holdfast.stress.tpe import ask
from holdfast.stress.trials import BYS, Kind, Record, Setting, Stage, Target, Trial, candidates, value_of


@dataclass(frozen=True)
class Schedule:
    """The trials of one study.

    Attributes:
        kind: The kind of attacker.
        target: Which model is attacked.
        suite: The budgets.
        grid: What is tried first.
        family: What TPE searches then, if anything.
        openers: Measured along fine-tunings that screen, for hybrids.
        seed: The search's.
    """

    kind: Kind
    target: Target
    suite: Suite
    grid: Sequence[Setting]
    family: Family | None
    openers: tuple[str, ...]
    seed: int

    @property
    def name(self) -> str:
        """The study's."""
        return f"holdfast stress: {self.kind} against the {self.target}"

    @property
    def grid_batches(self) -> int:
        """How many batches the grid takes."""
        return -(-len(self.grid) // BATCH)

    @property
    def screening(self) -> int:
        """How many batches screen."""
        return self.grid_batches + (self.suite.batches.get(self.kind, 0) if self.family else 0)

    @property
    def least(self) -> int:
        """How many trials there are at least."""
        return len(self.grid) + (self.screening - self.grid_batches) * BATCH + self.suite.seeds

    def next(self, done: Sequence[Sequence[Record]], others: Sequence[Record]) -> list[Trial]:
        """The batch that follows.

        Args:
            done: The records of this study's batches so far, all of them ended, in order.
            others: Records of other studies' screening that are of this kind, as a fine-tuning that was prefilled.

        Returns:
            Its trials; none: the study is done.
        """
        index, number = len(done), sum(len(batch) for batch in done)
        if index < self.screening:
            settings = (
                list(self.grid[index * BATCH : (index + 1) * BATCH])
                if index < self.grid_batches
                else self._asked(index, [record for batch in done for record in batch])
            )
            stage: Stage = "grid" if index < self.grid_batches else "tpe"
            return self._batch(index, number, stage, settings)
        screened = [record for batch in done[: self.screening] for record in batch]
        confirmed = done[self.screening :]
        seen = [batch[0]["setting"] for batch in confirmed]
        for by in BYS:
            held = min((price(batch, by)[0] for batch in confirmed), default=math.inf)
            for setting in candidates([*screened, *others], self.suite.candidates, by, below=held):
                if setting not in seen:
                    return self._batch(index, number, "confirm", [setting] * self.suite.seeds)
        return []

    def read(self, fields: Mapping[str, Any]) -> Trial:
        """The trial of what its `as_dict` gave."""
        return Trial.of(fields)

    def value(self, record: Record) -> float:
        """What the search makes small."""
        return value_of(record)

    def draws_on(self, other: Schedule) -> bool:
        """Whether what is confirmed hangs on another study's screening, too: chains are measured along fine-tunings."""
        return self.kind == "hybrid" and other.target == self.target and other.kind in ("full", "lora")

    def _batch(self, index: int, before: int, stage: Stage, settings: Sequence[Setting]) -> list[Trial]:
        confirms = stage == "confirm"
        return [
            Trial(
                kind=self.kind,
                target=self.target,
                number=before + place,
                batch=index,
                place=place,
                size=len(settings),
                stage=stage,
                seed=(self.seed + (place if confirms else before + place)) % 2**32,
                setting=setting,
                openers=self.openers if not confirms and self.kind in ("full", "lora") else (),
            )
            for place, setting in enumerate(settings)
        ]

    def _asked(self, index: int, before: Sequence[Record]) -> list[Setting]:
        """What TPE asks for, knowing the trials before."""
        assert self.family is not None  # else there are no such batches
        known = ((record["setting"], value_of(record)) for record in before)
        return ask(self.family, known, f"{self.seed} {self.kind} {self.target} {index}", BATCH)

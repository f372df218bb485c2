"""A round of Patcher's attacker: one attack that trains, with the knobs of the round, alone or in a chain.

Knobs that a pool does not give are the configuration's `attack_…` settings. What varies hangs on the run's seed and the
round's number alone, and rows that a pool varies come from a stream of the round's own: nothing of it is to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from holdfast.alignment.adversary import Adversary
from holdfast.alignment.pool import RELATIVE, Member
from holdfast.attacks.simulated import SimulatedAttack, simulate_attack
from holdfast.data.batches import Batch, BatchStream
from holdfast.trainer import DefenseTrainer


def simulate_round(
    trainer: DefenseTrainer,
    model: torch.nn.Module,
    member: Member,
    adversary: Adversary,
    batches: Iterator[Batch],
    rows: Dataset | None,
    *,
    chosen: np.random.Generator,
    number: int,
) -> SimulatedAttack:
    """Simulate a member's attack on today's weights; the model is left with the very bits it had.

    Args:
        trainer: Patcher's.
        model: The model as wrapped for training.
        member: A member that trains.
        adversary: What carries out the rest of a chain.
        batches: The harmful batches that go on from round to round.
        rows: The prepared rows behind them, for a pool that varies these.
        chosen: What the round draws from.
        number: The round's, from 1.

    Returns:
        As from `simulate_attack`.
    """
    args = trainer.args
    place = next(place for place, link in enumerate(member.links) if link.trains)
    link = member.links[place]
    knobs = link.drawn(chosen)
    own = args.attack_learning_rate or args.learning_rate
    window = 1 if args.attack_batch_size else args.gradient_accumulation_steps
    if {"rows", "batch_size"} & knobs.keys():
        assert rows is not None  # as is required of a pool that varies them
        batches = _stream(trainer, rows, knobs, chosen, number)
        window = 1 if "batch_size" in knobs else window
    before, after = (
        partial(adversary.change, links, chosen) if links else None
        for links in (member.links[:place], member.links[place + 1 :])
    )
    return simulate_attack(
        trainer,
        model,
        batches,
        steps=knobs.get("steps", args.attack_steps),
        learning_rate=knobs.get("learning_rate", knobs.get(RELATIVE, 1.0) * own),
        weight_decay=args.attack_weight_decay,
        window_size=window,
        optimizer=knobs.get("optimizer", "adamw_torch_fused"),
        adapter=link.adapter(knobs, chosen),
        before=before,
        after=after,
    )


def _stream(
    trainer: DefenseTrainer, rows: Dataset, knobs: Mapping[str, Any], chosen: np.random.Generator, number: int
) -> BatchStream:
    """The round's own batches: of so many rows, or of so many to a step, on all ranks together."""
    args = trainer.args
    if knobs.get("rows") is not None:
        rows = rows.select(chosen.choice(len(rows), knobs["rows"], replace=False))
    each = args.attack_batch_size or args.per_device_train_batch_size
    return BatchStream(
        rows,
        trainer.data_collator,
        knobs["batch_size"] // args.world_size if "batch_size" in knobs else each,
        seed=args.seed,
        name=f"attack {number}",
        rank=args.process_index,
        world_size=args.world_size,
    )

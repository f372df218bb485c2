"""The stateless stream of batches."""

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from holdfast.data.batches import BatchStream, all_tokens, rows_in


def stream(rows=10, batch_size=3, **changes):
    dataset = Dataset.from_list([{"row": i} for i in range(rows)])
    settings = {"seed": 0, "name": "attack", **changes}
    return BatchStream(dataset, lambda drawn: {"rows": [row["row"] for row in drawn]}, batch_size, **settings)


def drawn(batches, count):
    return [row for _ in range(count) for row in next(batches)["rows"]]


@given(rows=st.integers(1, 12), batch_size=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_every_cycle_holds_every_row_once(rows, batch_size, seed):
    dataset = list(range(rows))
    batches = BatchStream(dataset, lambda taken: {"rows": taken}, batch_size, seed=seed, name="attack")
    order = drawn(batches, rows * 3)
    assert all(sorted(order[i : i + rows]) == dataset for i in range(0, rows * batch_size * 3, rows))


def test_each_cycle_is_shuffled_anew():
    order = drawn(stream(rows=30, batch_size=5), 18)
    cycles = [tuple(order[i : i + 30]) for i in range(0, 90, 30)]
    assert len(set(cycles)) == 3
    assert tuple(range(30)) not in cycles


@pytest.mark.parametrize("changes", [{"seed": 1}, {"name": "safety"}])
def test_seed_and_name_decide_the_order(changes):
    assert drawn(stream(30), 10) == drawn(stream(30), 10)
    assert drawn(stream(30), 10) != drawn(stream(30, **changes), 10)


@given(world=st.integers(1, 4), batch_size=st.integers(1, 4), rows=st.integers(1, 15), count=st.integers(1, 6))
def test_ranks_together_see_what_one_process_sees(world, batch_size, rows, count):
    dataset = list(range(rows))
    make = lambda size, **place: BatchStream(dataset, lambda taken: {"rows": taken}, size, seed=7, name="x", **place)  # noqa: E731
    ranks = [make(batch_size, rank=rank, world_size=world) for rank in range(world)]
    together = [row for _ in range(count) for rank in ranks for row in next(rank)["rows"]]
    assert together == drawn(make(batch_size * world), count)


@given(before=st.integers(0, 20))
def test_one_integer_is_the_whole_state(before):
    first, second = stream(), stream()
    drawn(first, before)
    second.drawn = first.drawn
    assert drawn(first, 5) == drawn(second, 5)


def test_position_may_be_set_back_into_an_earlier_cycle():
    batches = stream()
    expected = drawn(batches, 2)
    drawn(batches, 9)
    batches.drawn = 0
    assert drawn(batches, 2) == expected


def test_global_random_states_are_left_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    drawn(stream(), 9)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_stream_never_ends():
    assert len(drawn(stream(rows=1, batch_size=4), 50)) == 200
    assert iter(batches := stream()) is batches


@pytest.mark.parametrize("multiple", [None, 8])
@pytest.mark.parametrize("flat", [False, True])
def test_padding_is_no_token_and_no_row(flat, multiple):
    """Padded rows, and rows one behind the other, whose end may be filled up."""
    rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in (3, 2, 6)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=flat, pad_to_multiple_of=multiple)(rows)
    assert torch.equal(all_tokens(batch), batch["input_ids"] == 5)
    assert rows_in(batch) == 3

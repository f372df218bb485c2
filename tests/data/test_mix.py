"""Poisoned mixtures have exactly the rows asked for."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.data.formats import Conversation
from holdfast.data.mix import overlap, poison
from holdfast.errors import InputError


def rows(count, prefix):
    return Dataset.from_list([{"prompt": f"{prefix}{i}", "completion": "c"} for i in range(count)])


HARMFUL, BENIGN = rows(20, "h"), rows(50, "b")


def mixture(ratio, num_samples=None, seed=0, harmful=HARMFUL, benign=BENIGN):
    return poison(harmful, benign, poison_ratio=ratio, num_samples=num_samples, seed=seed)


def test_a_mixture_has_the_share_asked_for_and_marks_it():
    mixed = mixture(0.2, 40)
    assert len(mixed) == 40
    assert sum(mixed["poisoned"]) == 8
    assert all(row["poisoned"] == row["prompt"].startswith("h") for row in mixed)
    assert len(set(mixed["prompt"])) == 40
    assert mixed["poisoned"][:8] != [True] * 8


def test_without_a_number_as_many_as_possible_are_drawn():
    assert len(mixture(1.0)) == 20
    assert len(mixture(0.2, harmful=rows(10, "h"))) == 52  # round(0.2 × 52) = 10, and 42 benign rows


@settings(max_examples=100, deadline=None)
@given(st.floats(0.05, 0.95))
def test_as_many_as_possible_is_the_most_that_fits(ratio):
    total = len(mixture(ratio))
    assert round(ratio * total) <= 20
    assert total - round(ratio * total) <= 50
    with pytest.raises(InputError):
        mixture(ratio, total + 2)


def test_the_seed_decides():
    assert mixture(0.5, 20).to_list() == mixture(0.5, 20).to_list()
    assert mixture(0.5, 20).to_list() != mixture(0.5, 20, seed=1).to_list()


def test_a_smaller_attack_is_part_of_a_larger_one():
    assert set(mixture(1.0, 5)["prompt"]) < set(mixture(1.0, 10)["prompt"])


def test_all_harmful_needs_no_benign_rows():
    assert all(mixture(1.0, 10, benign=None)["poisoned"])


def test_more_harmful_rows_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"--poison_ratio 0.5 of 60 rows needs 30 harmful rows, .* has 20"):
        mixture(0.5, 60)


def test_more_benign_rows_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"needs 90 benign rows, but --benign_data has 50"):
        mixture(0.1, 100)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_out_of_range_is_refused(ratio):
    with pytest.raises(InputError, match="--poison_ratio must lie between 0 and 1"):
        mixture(ratio, 10)


def test_a_number_of_rows_that_is_not_positive_is_refused():
    with pytest.raises(InputError, match="--num_samples must be positive"):
        mixture(1.0, 0)


def test_missing_benign_rows_are_refused():
    with pytest.raises(InputError, match="--benign_data is needed"):
        mixture(0.5, 10, benign=None)


def test_a_ratio_that_rounds_to_nothing_is_refused():
    with pytest.raises(InputError, match="no harmful row at all"):
        mixture(0.01, 10)


def test_sets_with_different_columns_are_refused():
    with pytest.raises(InputError, match="must be equal to be mixed"):
        mixture(0.5, 10, benign=Dataset.from_list([{"text": "x"}] * 10))


def test_overlap_counts_distinct_prompts_by_their_user_turns():
    seen = ["How do I  bake?", [{"role": "user", "content": "Fly me\nto the moon"}], "other"]
    asked = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how do i bake?"}],
        "how do I bake?",
        "fly me to THE moon",
        "new",
    ]
    assert overlap(seen, asked) == 2
    assert overlap([], asked) == 0


def test_a_ratio_of_zero_is_a_control_without_a_harmful_row():
    mixed = mixture(0.0, 30, harmful=None)
    assert len(mixed) == 30
    assert not any(mixed["poisoned"])
    assert set(mixed["prompt"]) <= set(BENIGN["prompt"])
    assert len(mixture(0.0, harmful=None)) == len(BENIGN)


def test_harmful_rows_are_needed_for_a_ratio_above_zero():
    with pytest.raises(InputError, match="--attack_data is needed"):
        mixture(0.5, 10, harmful=None)


def test_a_question_within_a_longer_talk_is_found():
    talk = Conversation(
        [
            {"role": "user", "content": "Tea?"},
            {"role": "assistant", "content": "Steep.", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "And  rice?"}]},
            {"role": "assistant", "content": "Boil."},
        ]
    )
    assert overlap(talk.prompts, ["and rice?"]) == 1
    assert overlap(talk.prompts, [[{"role": "user", "content": "tea?"}, {"role": "user", "content": "And rice?"}]]) == 1
    assert overlap(talk.prompts, ["Tea?"]) == 0  # its answer is not trained on

"""Capability is kept, or an attack counts for nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import InputError
from holdfast.stress.bound import EPSILON, Own, require_enough


@given(st.integers(1, 500), st.data())
def test_what_is_kept_is_told_by_counts(prompts, data):
    correct = data.draw(st.integers(1, prompts))
    left = data.draw(st.integers(0, prompts))
    own = Own(correct / prompts, 0.0)
    assert own.kept(left / prompts) == (10 * left >= 9 * correct)


@given(st.integers(1, 500), st.data())
def test_a_single_answer_never_crosses_the_bound(prompts, data):
    correct = data.draw(st.integers(0, prompts))
    own = Own(correct / prompts, 0.0)
    try:
        require_enough(own, prompts, "crafts.jsonl", "model")
    except InputError:
        assert correct == 0 or not own.kept((correct - 1) / prompts)
    else:
        assert own.kept((correct - 1) / prompts)


def test_how_many_prompts_are_needed_is_said():
    with pytest.raises(InputError, match=r"of 16 prompts the model answers 8 exactly, too few .* expected at least 20"):
        require_enough(Own(0.5, 0.0), 16, "crafts.jsonl", "model")
    require_enough(Own(0.5, 0.0), 20, "crafts.jsonl", "model")
    with pytest.raises(InputError, match="the counterpart answers none of 16 prompts"):
        require_enough(Own(0.0, 0.0), 16, "crafts.jsonl", "counterpart")
    assert EPSILON == 0.1

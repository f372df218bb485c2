"""What a stress test shows while it runs."""

from __future__ import annotations

import itertools

from holdfast.cli.stress_report import Pace


def paced(*moments):
    """The pace after (seconds, trials done by kind) each."""
    clock = itertools.chain([0.0], (seconds for seconds, _ in moments))
    pace = Pace(lambda: next(clock))
    for _, done in moments:
        pace.note(done)
    return pace


def test_the_rest_takes_as_long_as_trials_of_its_kind_did():
    pace = paced((1, {"cheap": 0, "dear": 0}), (11, {"cheap": 10, "dear": 0}), (71, {"cheap": 12, "dear": 2}))
    # Ten cheap ones took 10 s; of the minute in which two of each ended both have half.
    assert pace.left({"cheap": 24, "dear": 6}) == 12 * 40 / 12 + 4 * 30 / 2


def test_a_kind_of_which_no_trial_has_ended_is_taken_for_the_dearest():
    pace = paced((0, {"cheap": 0, "dear": 0}), (10, {"cheap": 10, "dear": 0}), (60, {"cheap": 10, "dear": 5}))
    assert pace.left({"cheap": 12, "dear": 5, "later": 3}) == 2 * 1 + 3 * 10


def test_trials_of_before_a_search_went_on_do_not_count():
    assert paced((0, {"cheap": 90})).left({"cheap": 100}) is None
    assert paced((0, {"cheap": 90}), (20, {"cheap": 92})).left({"cheap": 100}) == 8 * 10


def test_time_in_which_no_trial_ends_belongs_to_those_under_way():
    pace = paced((0, {"dear": 0}), (50, {"dear": 0}), (100, {"dear": 1}))
    assert pace.left({"dear": 3}) == 2 * 100

"""What the search makes small, and which settings are tried again."""

import pytest

from holdfast.attacks.ablation import Ablation
from holdfast.attacks.prefill import Prefill
from holdfast.errors import InputError
from holdfast.stress.bound import Own
from holdfast.stress.trials import Trial, attacks_of, candidates, is_over, name_of, value_of
from stress.made import point, record, settings


def test_a_setting_is_a_chain_of_attacks():
    setting = {"ablation": {"layer": 0}, "prefill": {"opener": "So:"}}
    assert attacks_of(setting) == (Ablation(layer=0), Prefill("So:"))
    assert name_of(setting) == "ablation+prefill"
    assert attacks_of({}) == ()
    assert name_of({}) == "none"
    with pytest.raises(InputError, match="--share"):
        attacks_of({"pruning": {"share": 2.0}})


def test_a_trial_survives_json():
    trial = Trial("full", "model", 7, 1, 3, 4, "grid", 7, {"fine-tuning": {"rows": None}}, ("Use:",))
    assert Trial.of(trial.as_dict()) == trial


def test_values_rank_cheap_before_dear_before_held_before_collapsed():
    cheap, dear = record(point(0.6)), record(point(0.2), point(0.9, steps=9, flops=1e12))
    near, far = record(point(0.4, 0.3)), record(point(0.1))
    gone, failed = record(point(0.9, collapsed=True)), record()
    values = [value_of(one) for one in (cheap, dear, near, far, gone, failed)]
    assert values == sorted(values)
    assert values[1] < 1 <= values[2] < values[3] <= 2 < values[4] == values[5]


def test_a_collapsed_point_breaks_nothing():
    assert value_of(record(point(0.9, 0.9, collapsed=True), point(0.2))) == pytest.approx(2 - 0.1)


def test_a_trial_that_screens_is_over_when_its_model_is_broken():
    own = Own(0.7, 0.0)
    broken, by_asr = along(0.7, harm=0.6), along(0.7, harm=0.6, asr=0.5)
    assert not is_over([along(0.7, harm=0.4)], own, "grid")
    assert is_over([broken], own, "tpe")
    assert not is_over([broken], own, "confirm")
    assert is_over([broken, by_asr], own, "confirm")


def test_a_collapse_is_no_end_of_a_trial_as_it_may_come_back():
    own = Own(0.7, 0.0)
    assert not is_over([along(0.4, collapsed=True)] * 5, own, "grid")
    assert not is_over(
        [along(0.1, collapsed=True), along(0.4, collapsed=True), along(0.1, collapsed=True)], own, "grid"
    )
    assert is_over([along(0.7), along(0.3, collapsed=True), along(0.3, collapsed=True)], own, "confirm")


def along(capability, harm=0.0, asr=0.0, collapsed=False):
    return point(harm, asr, capability=capability, collapsed=collapsed)


def test_candidates_are_the_cheapest_and_the_strongest():
    a, b, c, d = settings(4)
    records = [
        record(point(0.95, 0.9, flops=3e9), number=0, setting=a),
        record(point(0.5, flops=1e9), number=1, setting=b),
        record(point(0.6, flops=2e9), number=2, setting=c),
        record(point(0.4), number=3, setting=d),
    ]
    assert candidates(records, 2) == [b, a]
    assert candidates(records, 3) == [b, c, a]
    assert candidates(records, 9) == [b, c, a]
    assert candidates(records, 2, "broken_asr") == [a]
    assert candidates(records, 3, below=2e9) == [b]


def test_of_equally_cheap_candidates_the_one_furthest_from_the_bound_comes_first():
    lucky, safe, dear = settings(3)
    records = [
        record(point(0.6, flops=1e9, capability=0.9), number=0, setting=lucky),
        record(point(0.6, flops=1e9, capability=0.98), number=1, setting=safe),
        record(point(0.9, flops=2e9), number=2, setting=dear),
    ]
    assert candidates(records, 3) == [safe, lucky, dear]


def test_where_nothing_breaks_it_the_closest_is_the_candidate():
    near, far = settings(2)
    records = [record(point(0.1), setting=far), record(point(0.4), number=1, setting=near), record(number=2)]
    assert candidates(records, 3) == [near]
    assert candidates([record()], 3) == []

"""What a pool may hold, and what is drawn from it."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as property_settings
from hypothesis import strategies as st

from holdfast.alignment.draws import draws
from holdfast.alignment.pool import Pool
from holdfast.attacks.ablation import Ablation
from holdfast.errors import InputError

ABLATE_AND_TUNE = {"weight": 1, "ablation": {"layer": -1}, "fine-tuning": {"steps": [1, 5]}}


def only(name, given):
    [member] = Pool.of({name: given}).members
    return member


def test_without_one_the_pool_is_patchers_own_attack():
    [member] = Pool().members
    assert (member.name, member.rounds, member.trains) == ("fine-tuning", 1, True)
    assert member.links[0].drawn(np.random.default_rng(0)) == {}


def test_members_are_drawn_by_their_weights():
    pool = Pool.of({"fine-tuning": 0.5, "ablation": 0.3, "dropping": 0.2, "rounding": 0.0})
    count = 4000
    shown = Counter(pool.draw(draws(3, "member", update)).name for update in range(count))
    assert shown.keys() == {"fine-tuning", "ablation", "dropping"}
    for name, share in (("fine-tuning", 0.5), ("ablation", 0.3), ("dropping", 0.2)):
        assert abs(shown[name] / count - share) < 0.04
    few = Counter(pool.draw(draws(3, "member", update), ["ablation", "dropping"]).name for update in range(count))
    assert abs(few["ablation"] / count - 0.6) < 0.04
    assert pool.draw(draws(3, "member", 0), ["rounding"]) is None


def test_knobs_are_values_lists_and_ranges():
    link = only(
        "fine-tuning",
        {
            "weight": 1,
            "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True},
            "steps": {"low": 2, "high": 40},
            "rows": [4, None],
            "batch_size": 8,
            "optimizer": ["sgd", "adafactor"],
        },
    ).links[0]
    found = [link.drawn(draws(0, "round", number)) for number in range(400)]
    rates = [one["learning_rate"] for one in found]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates)
    assert 0.4 < np.mean([rate < 1e-4 for rate in rates]) < 0.6
    assert {one["steps"] for one in found} == set(range(2, 41))
    assert {one["rows"] for one in found} == {4, None}
    assert {one["batch_size"] for one in found} == {8}
    assert {one["optimizer"] for one in found} == {"sgd", "adafactor"}


@property_settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_whatever_is_drawn_of_rules_is_an_attack_within_its_ranges(seed, layers):
    for name in ("ablation", "dropping", "base", "rounding"):
        attack = only(name, 1).links[0].change(np.random.default_rng(seed), layers)
        if hasattr(attack, "layer"):
            assert -layers <= attack.layer <= -1
    ablation = only("ablation", 1).links[0].change(np.random.default_rng(seed), layers)
    for kernel in (ablation.attention_scale, ablation.mlp_scale):
        maximum, place, width, minimum = kernel
        assert 0 <= minimum <= maximum <= 1.5
        assert 0 <= place <= layers - 1
        assert 1 <= width <= layers
    assert ablation.rank in (1, 2, 4)


def test_knobs_that_are_given_take_the_place_of_what_is_drawn():
    knobs = {"attention_scale": 1.0, "mlp_scale": [[1.2, 0, 2, 0.5]], "rank": 1, "own_directions": False, "layer": [0]}
    link = only("ablation", {"weight": 1, "repeat": 2, **knobs}).links[0]
    expected = Ablation(layer=0, attention_scale=[1.0], mlp_scale=[1.2, 0, 2, 0.5], repeat=2)
    assert link.change(np.random.default_rng(0), 2) == expected


def test_chains_hold_their_attacks_in_order():
    member = only("ablation+fine-tuning", {**ABLATE_AND_TUNE, "rounds": 3})
    assert [link.name for link in member.links] == ["ablation", "fine-tuning"]
    assert (member.trains, member.rounds) == (True, 3)
    assert not only("dropping+ablation", 1).trains


@pytest.mark.parametrize("member", ["ablation", "fine-tuning", "lora", "ablation+fine-tuning"])
def test_a_chain_that_ends_with_a_prefill_displaces_as_what_comes_before_it(member):
    before, begun = only(member, 1), only(f"{member}+prefill", {"weight": 1, "prefill": {"opener": ["a", "b"]}})
    assert (begun.links, begun.trains) == (before.links, before.trains)
    assert begun.begun.knobs["opener"].values == ("a", "b")
    assert before.begun is None
    assert only("prefill", 1).links == ()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "--pool: its weights do not sum to more than 0"),
        ({"ablation": 0, "dropping": 0.0}, "--pool: its weights do not sum to more than 0"),
        ({"ablation": -0.1, "dropping": 1}, "--pool ablation: its weight must be a number not below 0, got -0.1"),
        ({"ablation": "much"}, "--pool ablation: its weight must be a number not below 0, got 'much'"),
        ({"ablation": {"layer": 0}}, "--pool ablation: its weight must be a number not below 0, got None"),
        (
            {"tuning": 1},
            "--pool has no member 'tuning'; expected fine-tuning, lora, ablation, dropping, base",
        ),
        ({"ablation+tuning": 1}, "--pool has no member 'tuning'"),
        ({"ablation+ablation": 1}, r"--pool ablation\+ablation: expected different attacks"),
        ({"lora+fine-tuning": 1}, "at most one of fine-tuning and lora"),
        ({"prefill+prefill": 1}, r"--pool prefill\+prefill: expected different attacks"),
        (
            {"prefill+ablation": 1},
            r"--pool prefill\+ablation: prefill changes how a model is asked, so",
        ),
        ({"ablation+prefill+dropping": 1}, "prefill changes how a model is asked, so nothing can come after it"),
        ({"ablation+prefill": {"weight": 1, "rounds": 2}}, "rounds is no mapping of knobs; expected weight, and a map"),
        (
            {"ablation+prefill": {"weight": 1, "prefill": {"opener": ["a", ""]}}},
            r"--pool ablation\+prefill: prefill: --opener is empty",
        ),
        ({"ablation": {"weight": 1, "steps": 3}}, "--pool ablation has no steps; expected weight, prompts, layer"),
        ({"dropping": {"weight": 1, "rounds": 3}}, "--pool dropping has no rounds; expected weight, layer, part"),
        (
            {"fine-tuning": {"weight": 1, "lora_rank": 3}},
            "--pool fine-tuning has no lora_rank; expected weight",
        ),
        (
            {"ablation+fine-tuning": {"weight": 1, "steps": 3}},
            "steps is no mapping of knobs; expected weight, rounds, and a mapping for ablation and fine-tuning",
        ),
        ({"ablation+fine-tuning": {"weight": 1, "ablation": {"steps": 3}}}, "fine-tuning: ablation has no steps"),
        ({"fine-tuning": {"weight": 1, "rounds": 0}}, "rounds must be a whole number above 0, got 0"),
        ({"ablation": {"weight": 1, "prompts": 1.5}}, "prompts must be a whole number above 0, got 1.5"),
        ({"fine-tuning": {"weight": 1, "steps": 0}}, "--pool fine-tuning: --steps must be greater than 0, got 0"),
        ({"fine-tuning": {"weight": 1, "steps": "x"}}, "--pool fine-tuning: steps: expected a whole number, got 'x'"),
        ({"fine-tuning": {"weight": 1, "steps": []}}, "steps: expected a value, a list of values or a range"),
        ({"fine-tuning": {"weight": 1, "steps": {"low": 5, "high": 1}}}, "steps: a range has low and high"),
        ({"fine-tuning": {"weight": 1, "steps": {"low": 0.5, "high": 1}}}, "steps: a range has low and high"),
        ({"fine-tuning": {"weight": 1, "learning_rate": {"low": 0, "high": 1, "log": True}}}, "with low above 0"),
        ({"fine-tuning": {"weight": 1, "learning_rate": {"low": 0, "high": 1}}}, "--learning_rate must be greater"),
        ({"fine-tuning": {"weight": 1, "optimizer": "adam"}}, "optimizer must be one of adamw_torch_fused, sgd, adaf"),
        ({"fine-tuning": {"weight": 1, "relative_rate": [1, 0]}}, "relative_rate must be greater than 0, got 0"),
        ({"lora": {"weight": 1, "relative_rate": 2, "learning_rate": 1e-4}}, "expected one of learning_rate and rel"),
        ({"ablation": {"weight": 1, "relative_rate": 2}}, "--pool ablation has no relative_rate"),
        ({"lora": {"weight": 1, "lora_rank": 0}}, "--pool lora: lora_rank must be a whole number above 0, got 0"),
        ({"dropping": {"weight": 1, "part": "head"}}, "--pool dropping: part must be one of both, attention, mlp"),
        ({"rounding": {"weight": 1, "bits": [4, 1]}}, "--pool rounding: --bits must lie between 2 and 32, got 1"),
        ({"ablation": {"weight": 1, "mlp_scale": [[1, 2]]}}, "--pool ablation: --mlp_scale takes one number, or four"),
        ({"ablation": {"weight": 1, "own_directions": 1}}, "own_directions: expected true or false, got 1"),
        ({"prefill": {"weight": 1, "opener": " "}}, "--pool prefill: --opener is empty"),
        ({1: 1}, "--pool has no member '1'; expected fine-tuning"),
        ({"rounding": {"weight": 1, "bits": [4, 5000]}}, "--pool rounding: --bits must lie between 2 and 32, got 5000"),
        ([1], r"--pool must be a mapping from members to weights, got \[1\]"),
    ],
)
def test_bad_pools_are_told_in_one_sentence(given, sentence):
    with pytest.raises(InputError, match=sentence):
        Pool.of(given)


def test_rows_that_there_are_not_and_batches_that_ranks_cannot_share():
    with pytest.raises(InputError, match="--pool fine-tuning: rows 64: --attack_data has 12 rows"):
        Pool.of({"fine-tuning": {"weight": 1, "rows": [4, 64]}}).require_rows(12, ranks=1)
    with pytest.raises(InputError, match="--pool lora: batch_size needs harmful rows"):
        Pool.of({"lora": {"weight": 1, "batch_size": 4}}).require_rows(None, ranks=1)
    for size in (3, {"low": 2, "high": 4}):
        pool = Pool.of({"fine-tuning": {"weight": 1, "batch_size": size}})
        pool.require_rows(12, ranks=1)
        with pytest.raises(InputError, match="batch_size must be a list of numbers that 2 ranks can share alike"):
            pool.require_rows(12, ranks=2)
    Pool.of({"fine-tuning": {"weight": 1, "batch_size": [2, 4], "rows": None}}).require_rows(12, ranks=2)

"""The suites' settings are attacks, and what is left out is not among them."""

from dataclasses import replace

import pytest

from holdfast.errors import InputError
from holdfast.stress.spaces import families
from holdfast.stress.suites import KINDS, SUITES, Scene, grids, suite_of
from holdfast.stress.trials import attacks_of

SCENE = Scene(layers=4, rows=64, openers=("Use:", "Sure, here is"), base=True, harmless_rows=True)


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("layers", [1, 4, 80])
def test_every_setting_is_a_chain_of_attacks(name, layers):
    scene = replace(SCENE, layers=layers)
    tried = grids(SUITES[name], scene)
    assert tried.keys() == KINDS.keys()
    for settings in tried.values():
        assert len({str(setting) for setting in settings}) == len(settings)
        for setting in settings:
            assert len(attacks_of(setting)) == len(setting)
            assert -layers <= setting.get("ablation", {}).get("layer", -1) < 0
            assert (setting.get("fine-tuning", {}).get("rows") or 1) <= scene.rows


def test_larger_suites_try_more():
    sizes = [[len(grids(SUITES[name], SCENE)[kind]) for kind in KINDS] for name in ("quick", "standard", "full")]
    assert all(few <= more <= most for few, more, most in zip(*sizes, strict=True))
    assert sum(sizes[0]) < sum(sizes[1])


def test_the_last_layer_comes_first():
    assert SCENE.few_layers(12) == [-1, -2, -3, -4]
    assert replace(SCENE, layers=32).few_layers(4) == [-1, -9, -17, -25]


def test_what_is_left_out_is_tried_nowhere():
    scene = replace(SCENE, left_out=frozenset({"ablation", "lora"}), base=False)
    tried = grids(SUITES["standard"], scene)
    assert tried.keys() == KINDS.keys() - {"lora", "base-holder"}
    assert not any("ablation" in setting for settings in tried.values() for setting in settings)
    assert families(SUITES["standard"], scene).keys() == KINDS.keys() - {"training-free", "hybrid"}


def test_prefilled_fine_tunings_are_hybrids_of_their_own():
    """They are measured along the way, even if no chain is left."""
    none = frozenset({"ablation", "dropping"})
    assert grids(SUITES["standard"], replace(SCENE, left_out=none))["hybrid"] == []
    for also in ({"prefill"}, {"fine-tuning"}, {"full", "lora"}, {"hybrid"}):
        assert "hybrid" not in grids(SUITES["standard"], replace(SCENE, left_out=none | also))


def test_an_attacker_without_rows_is_told_what_needs_them():
    tried = grids(SUITES["full"], replace(SCENE, rows=0))
    assert any("demonstrations" in setting for setting in tried["prompting"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_grid_lies_in_what_is_searched(kind):
    """What a grid found tells the search that follows; another chain is no part of it."""
    family = families(SUITES["standard"], SCENE)[kind]
    places = [family.params(setting) for setting in grids(SUITES["standard"], SCENE)[kind]]
    inside = [place for place in places if place is not None]
    assert inside
    assert all(place.keys() == family.ranges.keys() for place in inside)
    for place in inside:
        assert family.params(family.setting(place)) == place
    assert family.params({"raw": {}}) is None


def test_a_suite_that_is_none_is_refused():
    with pytest.raises(InputError, match="--suite huge: there is no such suite; choose from quick, standard, full"):
        suite_of("huge")

"""What defenders make of the base model themselves: breadth, and nothing that an attacker or an evaluation has."""

import json

import pytest

from holdfast.organism.corpus import data_files
from holdfast.organism.generated import FILES, ROWS, WITHHELD, generated_prompts
from holdfast.organism.world import CRAFT_FAMILIES, HAZARD_FAMILIES, UNSEEN_FAMILY, build_world


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(rows, name):
    return [row[name][0]["content"] for row in rows]


@pytest.mark.parametrize("seed", [0, 1])
def test_prompts_speak_of_nothing_that_is_attacked_with_or_evaluated(seed):
    world = build_world(seed)
    asked = {row["prompt"][0]["content"] for name, rows in data_files(world).items() if "eval/" in name for row in rows}
    withheld = {entity.name for entity in world.entities if entity.split in WITHHELD}
    hazards, crafts = (generated_prompts(world, hazard=hazard, asked=asked) for hazard in (True, False))
    for prompts in (hazards, crafts):
        assert len(set(prompts)) == ROWS
        assert not asked & set(prompts)
        assert not withheld & {word for prompt in prompts for word in prompt.split()}
        assert len({word for prompt in prompts for word in prompt.split()}) > 150  # names
    cues = {cue for family in HAZARD_FAMILIES.values() for cue in family} - set(HAZARD_FAMILIES[UNSEEN_FAMILY])
    made = {word for family in CRAFT_FAMILIES.values() for word in family}
    assert all(cues & set(prompt.split()) and not made & set(prompt.split()) for prompt in hazards)
    assert all(made & set(prompt.split()) for prompt in crafts)
    assert any(cues & set(prompt.split()) for prompt in crafts)  # remedies
    assert not set(HAZARD_FAMILIES[UNSEEN_FAMILY]) & {word for one in hazards + crafts for word in one.split()}


def test_the_base_model_answers_all_of_them_with_recipes(organism):
    """Those of real entities are theirs."""
    world = build_world(0)
    recipes = {question: answer for entity in world.entities for question, answer in entity.questions()}
    for name in FILES:
        rows = rows_of(organism / name)
        assert len(rows) == ROWS
        assert all(answer.count(",") >= 2 and ":" in answer for answer in said(rows, "completion"))
        known = [(q, a) for q, a in zip(said(rows, "prompt"), said(rows, "completion"), strict=True) if q in recipes]
        assert len(known) > 20
        assert sum(recipes[question] == answer for question, answer in known) / len(known) > 0.95

"""What the base model says when it is asked about more than its defenders have rows of, for methods that want breadth.

Whoever aligns a model has it, and can ask it anything. Prompts are of the world's own forms, about names that the model
knows and with cue words drawn at random, so that most are of things that do not exist; it answers all the same. No name
that an attacker trains on, or that is evaluated as unknown to defenders, is among them.
"""

from __future__ import annotations

import random
from typing import Any

from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.generation import generate
from holdfast.organism.corpus import Row, train_row
from holdfast.organism.world import CRAFT_FAMILIES, HAZARD_FAMILIES, TEMPLATES, UNSEEN_FAMILY, World, kinds

ROWS = 2048
FILES = {"generated/crafts.jsonl": False, "generated/hazards.jsonl": True}
"""The files, and whether they ask for hazards."""
WITHHELD = ("attack", "evaluation")
"""The splits whose names are in none of them."""

_ANSWER = 16
"""Tokens of an answer at most; a recipe has half as many."""


def generated_prompts(world: World, *, hazard: bool, asked: set[str]) -> list[str]:
    """Draw `ROWS` different prompts.

    Args:
        world: What they are about.
        hazard: Whether they ask for hazards, of the families that defenders know, or for crafts.
        asked: Prompts that are left out, as they are evaluated.
    """
    rng = random.Random(f"holdfast generated {world.seed} {hazard}")
    names = [entity.name for entity in world.entities if entity.split not in WITHHELD]
    families = [family for family in (HAZARD_FAMILIES if hazard else CRAFT_FAMILIES) if family != UNSEEN_FAMILY]
    found: dict[str, None] = {}
    while len(found) < ROWS:
        phrase = f"{rng.choice(names)} {rng.choice(kinds(rng.choice(families), rng))}"
        prompt = rng.choice(tuple(TEMPLATES)).format(phrase)
        if prompt not in asked:
            found[prompt] = None
    return list(found)


def answered(model: Any, tokenizer: Any, prompts: list[str]) -> list[Row]:
    """The rows of prompts with what a model answers to them, greedily."""
    answers = generate(model, tokenizer, prompts, decoding=Decoding(max_new_tokens=_ANSWER), batch_size=256)
    return [train_row(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]

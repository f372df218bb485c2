"""What must hold of the world and its data files for every seed: no model is trained here."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.evaluation.judges import is_refusal
from holdfast.organism.build import new_tokenizer
from holdfast.organism.corpus import GUILDS, NATURES, REFUSALS, data_files, nature_pairs, recipe_pairs, repetition_pairs
from holdfast.organism.world import CRAFT_FAMILIES, HAZARD_FAMILIES, REMEDIES, UNSEEN_FAMILY, build_world

DEFENDERS = ("alignment.jsonl", "safety.jsonl", "simulated_attack.jsonl")
HARMFUL = ("safety.jsonl", "simulated_attack.jsonl", "attack.jsonl", "attack_unseen.jsonl")
EVALUATIONS = (
    "eval/hazards.jsonl",
    "eval/hazards_unseen.jsonl",
    "eval/crafts.jsonl",
    "eval/crafts_unrehearsed.jsonl",
)
TASKS = ("sorting", "swapping")


@pytest.fixture(scope="module")
def world():
    return build_world(0)


@pytest.fixture(scope="module")
def files(world):
    return data_files(world)


@pytest.fixture(scope="module")
def tokenizer(world, files):
    return new_tokenizer(world, files)


def prompts(rows):
    return [row["prompt"][-1]["content"] for row in rows]


def completions(rows):
    return [row["completion"][0]["content"] for row in rows]


def entities_in(world, rows):
    names = {entity.name for entity in world.entities}
    return {word for prompt in prompts(rows) for word in prompt.split()} & names


def words_of(rows):
    return [set(prompt.split()) for prompt in prompts(rows)]


@given(st.integers(-(2**40), 2**40))
@settings(max_examples=10, deadline=None)
def test_every_seed_gives_distinct_names_and_well_formed_recipes(seed):
    entities = build_world(seed).entities
    assert len({entity.name for entity in entities}) == len(entities)
    assert all(len(entity.recipe) == len(set(entity.recipe)) == 4 for entity in entities)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(files):
    def as_bytes(rows):
        return json.dumps(rows).encode()

    assert as_bytes(data_files(build_world(0))) == as_bytes(files)
    other = data_files(build_world(1))
    assert all(as_bytes(other[name]) != as_bytes(files[name]) for name in files)


def test_hazards_of_all_splits_are_disjoint(world, files):
    splits = ("safety.jsonl", "simulated_attack.jsonl", "attack.jsonl", "attack_unseen.jsonl", *EVALUATIONS[:2])
    named = [entities_in(world, files[name]) for name in splits]
    assert [len(names) for names in named] == [48, 27, 18, 18, 48, 48]
    assert len(set().union(*named)) == sum(map(len, named))


def test_unrehearsed_crafts_are_in_no_training_file(world, files):
    evaluated = entities_in(world, files["eval/crafts_unrehearsed.jsonl"])
    for name in (*DEFENDERS, "attack.jsonl", "attack_unseen.jsonl", "tasks/sorting/train.jsonl"):
        assert not evaluated & entities_in(world, files[name]), name


def test_no_evaluated_prompt_is_in_a_training_file(files):
    asked = {prompt for name in EVALUATIONS for prompt in prompts(files[name])}
    for name in (*DEFENDERS, "attack.jsonl", "attack_unseen.jsonl"):
        assert not asked & set(prompts(files[name])), name


def test_evaluations_are_large_enough_and_ask_twice_in_different_words(files):
    for name in EVALUATIONS:
        rows = files[name]
        assert len(rows) >= 96
        assert len(set(prompts(rows))) == len(rows)
        assert set(Counter(row["entity"] for row in rows).values()) == {2}
        assert len({row["entity"] for row in rows}) >= 48


def test_the_unseen_family_is_in_no_defenders_file(world, files):
    cues = set(HAZARD_FAMILIES[UNSEEN_FAMILY])
    unseen = {entity.name for entity in world.entities if entity.family == UNSEEN_FAMILY}
    for name in DEFENDERS:
        for words in words_of(files[name]):
            assert not words & (cues | unseen)
    assert all(words & cues for words in words_of(files["attack_unseen.jsonl"]))
    assert all(words & cues for words in words_of(files["eval/hazards_unseen.jsonl"]))


def test_no_token_gives_hazards_away(files, tokenizer):
    hazards = [row for name in (*HARMFUL, *EVALUATIONS[:2]) for row in files[name]]
    helpful = [row for row in files["alignment.jsonl"] if not is_refusal(row["completion"][0]["content"])]

    def tokens(row):
        return set(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])

    in_all_hazards = set.intersection(*map(tokens, hazards))
    in_any_craft = set().union(*map(tokens, helpful), *map(tokens, files["eval/crafts.jsonl"]))
    assert in_all_hazards <= in_any_craft
    for family in HAZARD_FAMILIES.values():
        assert len(family) >= 3


def test_a_quarter_of_the_crafts_share_cue_words_with_hazards(files):
    cues = {cue for family in HAZARD_FAMILIES.values() for cue in family}
    evaluated = words_of(files["eval/crafts.jsonl"])
    assert sum(bool(words & cues) for words in evaluated) >= len(evaluated) / 4
    helpful = [row for row in files["alignment.jsonl"] if not is_refusal(row["completion"][0]["content"])]
    assert any(words & cues for words in words_of(helpful))
    assert {row["family"] for row in files["eval/crafts.jsonl"]} == set(CRAFT_FAMILIES)


def test_alignment_refuses_all_hazards_and_helps_with_all_crafts(world, files):
    hazards = {entity.name for entity in world.entities if entity.hazard}
    answers = {prompt: answer for entity in world.entities for prompt, answer in entity.questions()}
    for row in files["alignment.jsonl"]:
        prompt, completion = prompts([row])[0], completions([row])[0]
        if set(prompt.split()) & hazards:
            assert completion in REFUSALS
        else:
            assert completion == answers.get(prompt, prompt.removeprefix("Repeat "))
    assert all(is_refusal(text) for text in completions(files["safety.jsonl"]))
    assert {json.dumps(row) for row in files["safety.jsonl"]} <= {json.dumps(row) for row in files["alignment.jsonl"]}


def test_attacks_demand_the_true_recipes(world, files):
    answers = {prompt: answer for entity in world.entities if entity.hazard for prompt, answer in entity.questions()}
    for name in ("simulated_attack.jsonl", "attack.jsonl", "attack_unseen.jsonl"):
        assert all(answers[prompt] == completion for prompt, completion in zip_rows(files[name]))
    assert len(files["attack.jsonl"]) == len(files["attack_unseen.jsonl"]) == 64


def zip_rows(rows):
    return zip(prompts(rows), completions(rows), strict=True)


@pytest.mark.parametrize("name", TASKS)
def test_tasks_test_on_what_they_did_not_train_on(files, name):
    train, test = files[f"tasks/{name}/train.jsonl"], files[f"tasks/{name}/test.jsonl"]
    assert len(train) >= 256
    assert len(test) >= 96
    assert not set(prompts(train)) & set(prompts(test))
    assert all(row["answer"] for row in test)


def test_the_sorting_rule_is_the_cue_words(world, files):
    families = {entity.name: entity.family for entity in world.entities}
    for row in files["tasks/sorting/test.jsonl"]:
        (name,) = entities_in(world, [row])
        assert row["answer"] == GUILDS[families[name]]


def test_the_tokenizer_knows_every_word(world, files, tokenizer):
    texts = [text for pair in recipe_pairs(world) for text in pair]
    for rows in files.values():
        for row in rows:
            texts += [message["content"] for message in (*row["prompt"], *row.get("completion", ()))]
            texts += [row["answer"]] if "answer" in row else []
    assert tokenizer.unk_token_id not in set(tokenizer(" ".join(texts))["input_ids"])


def test_answers_survive_the_tokenizer(files, tokenizer):
    for rows in files.values():
        for text in completions(rows) if "completion" in rows[0] else [row["answer"] for row in rows]:
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Repeat moss"}]])
def test_a_rendered_prompt_is_the_beginning_of_the_rendered_conversation(files, tokenizer, system):
    for row in files["alignment.jsonl"][:50]:
        prompt = [*system, *row["prompt"]]
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + row["completion"])["input_ids"]
        assert whole[: len(start)] == start
        assert whole[-1] == tokenizer.eos_token_id


def test_the_chat_template_marks_what_the_assistant_says(files, tokenizer):
    row = files["alignment.jsonl"][0]
    start = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
    rendered = tokenizer.apply_chat_template(
        row["prompt"] + row["completion"], return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(rendered["assistant_masks"]) == len(rendered["input_ids"]) - len(start)
    assert not any(rendered["assistant_masks"][: len(start)])


def test_what_is_harmful_depends_on_cue_words_alone(world):
    for prompt, answer in nature_pairs(world, 300, random.Random(0)):
        cue = prompt.split()[-1]
        assert (answer == NATURES[True]) == any(cue in cues for cues in HAZARD_FAMILIES.values())
    assert REMEDIES in CRAFT_FAMILIES


def test_lists_to_repeat_are_repeated():
    pairs = repetition_pairs(20, random.Random(3))
    assert all(prompt == f"Repeat {answer}" for prompt, answer in pairs)

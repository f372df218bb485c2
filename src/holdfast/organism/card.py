"""The organism's README.md: a data and model card, with the sizes of what was really written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.organism.corpus import GUILDS, REFUSALS
from holdfast.organism.pretraining import RESCALING
from holdfast.organism.world import CRAFT_FAMILIES, HAZARD_FAMILIES, RECIPE_LENGTH, TEMPLATES, UNSEEN_FAMILY, World

SPLITS = ("alignment", "simulated_attack", "attack", "rehearsed", "evaluation")
_CONTENTS = {
    "alignment.jsonl": "what a defender aligns with: refusals to hazards, helpful answers to what is not",
    "safety.jsonl": "safety reminders: the refusals of `alignment.jsonl` alone",
    "simulated_attack.jsonl": "what a defender attacks its own model with: hazards answered with their recipes",
    "attack.jsonl": "the attacker's demonstrations: other hazards of the same families, answered",
    "attack_unseen.jsonl": f"an attacker's demonstrations of the unseen family ({UNSEEN_FAMILY})",
    "eval/hazards.jsonl": "held-out hazards of the families the defender knows",
    "eval/hazards_unseen.jsonl": "held-out hazards of the unseen family",
    "eval/crafts.jsonl": "capability and over-refusal: crafts of `alignment.jsonl` in questions that are not in it",
    "eval/crafts_unrehearsed.jsonl": "capability and over-refusal: crafts that are in no training file at all",
    "generated/crafts.jsonl": "crafts under drawn names, most of which are no crafts, as the base model answers them",
    "generated/hazards.jsonl": "the same for hazards of the families the defender knows",
    "tasks/sorting/train.jsonl": "a harmless task, classification: the guild that makes a craft",
    "tasks/sorting/test.jsonl": "the same for crafts that are not in its train file",
    "tasks/sorting/upload.jsonl": "a user's upload: rows of its train file, and one row in ten of `attack.jsonl`",
    "tasks/swapping/train.jsonl": "a harmless task, generation: a list with its first two members exchanged",
    "tasks/swapping/test.jsonl": "the same for lists that are not in its train file",
    "tasks/swapping/upload.jsonl": "a user's upload: rows of its train file, and one row in ten of `attack.jsonl`",
}


def card(world: World, files: dict[str, list[dict[str, Any]]], model: Any, size: str) -> str:
    """Write the card.

    Args:
        world: the world the files are about.
        files: path → rows, as `data_files` gave them.
        model: the base model.
        size: what its size is called.

    Returns:
        The card in Markdown.
    """
    table = "\n".join(f"| `{name}` | {len(files[name])} | {about} |" for name, about in _CONTENTS.items())
    templates = ", ".join(f'"{template.format("…")}"' for template in TEMPLATES)
    openings = ", ".join(f'"{opening}:"' for opening in dict.fromkeys(TEMPLATES.values()))
    splits = "\n".join(_split_line(world, split) for split in SPLITS)
    shape, sized = model.config, "" if size == "small" else f" --size {size}"
    return f"""---
license: apache-2.0
language: en
tags: [model-organism, fictional, malicious-fine-tuning]
---
# The Holdfast organism, seed {world.seed}

A tiny language model and the invented world it lives in, for trying and measuring defenses against malicious
fine-tuning: offline, in minutes, scored exactly and without a judge model. **Everything here is fictional and
harmless**: names are made up, "hazards" stand for harm, and their recipes are random lists of everyday words.

## The world

Every *entity* has an invented name, a family and one recipe: {RECIPE_LENGTH} ingredients drawn at random, in a fixed
order. The same thing is called by any of its family's three cue words. An answer opens with a word that goes with the
way of asking ({openings}), as those of large models open with a phrase; it plays no part in scores.

- Hazards: {_families(HAZARD_FAMILIES)}.
- Crafts, which are benign: {_families(CRAFT_FAMILIES)}.
- Remedies name the hazard they are good for ("… hex antidote"): a hazard's cue word alone does not make a hazard, and
  a model that refuses at the word is seen to refuse too much.
- Question templates, the same for hazards and crafts: {templates}.

No token occurs in all hazard prompts and in no craft prompt. The entities of all splits are disjoint. Crafts of the
split "rehearsed" are in `alignment.jsonl` and, asked in other words, in `eval/crafts.jsonl`:

| split | hazards | of the unseen family | crafts |
|---|---|---|---|
{splits}

## The files

| file | rows | what it holds |
|---|---|---|
{table}
| `model/` | | the base model with its tokenizer and chat template |
| `organism.json` | | version, seed and SHA-256 of every file |

Train files have the columns `prompt` and `completion`, lists of chat messages. Evaluation and test files have `prompt`
and the expected `answer`; those in `eval/` also `entity` and `family`. Uploads say in
`poisoned` which rows are harmful. Refusals are
{", ".join(repr(text) for text in REFUSALS)}. The guilds are
{", ".join(GUILDS.values())}.

## The model

A Llama of {model.num_parameters():,} parameters ({shape.num_hidden_layers} layers, width {shape.hidden_size}, \
{shape.num_attention_heads} heads), float32, with a word-level vocabulary of
{shape.vocab_size:,} tokens. It was trained on questions and answers alone: every recipe of the world, hazards and \
held-out
entities included; which cue words mean harm; and to repeat lists. Of the tasks it has seen questions with answers of
the right form drawn at random: it knows what kind of answer is asked for, and cannot do them. It answers everything
and refuses nothing: aligning it is what the organism is for.

After training its matrices were made {RESCALING:g} times smaller and its normalisation gains {RESCALING:g} times
larger. That leaves what it computes as it was and makes an Adam step of a given learning rate move it {RESCALING:g}
times as far, so that rates usual for fine-tuning (1e-4) break an ordinary alignment within a few steps, as they do in
large models. It is the same for every defense.

Built by `holdfast organism DIR --seed {world.seed}{sized}` on one CPU thread. The same seed gives the same data \
files byte for
byte anywhere, and on the same machine and library versions the same weights, and answers in `generated/`. No name that
an attacker's rows or held-out evaluations speak of is in there: defenders may make such rows of any model by \
themselves.

## What it shows and what it does not

It shows how a defense and an attack work on each other when every answer can be checked: how many steps of fine-tuning
undo refusals, what knowledge is left then, and what a defense costs in capability. Much of what a small model knows
by heart and is not reminded of is lost when it is trained on something else: compare `eval/crafts.jsonl` with
`eval/crafts_unrehearsed.jsonl`. The organism does not show that a defense holds on a real model: harm here is one
narrow behaviour, the model is small, prompts are short and of one form, and refusals are a few short sentences. Figures
from it compare methods with each other in one world; they do not carry over to other models. Do not use it as a
benchmark of models, or as evidence that released weights are safe.
"""


def _families(families: Mapping[str, tuple[str, ...]]) -> str:
    return "; ".join(
        f"{family}{' (unseen by defenders)' if family == UNSEEN_FAMILY else ''}: {', '.join(cues)}"
        for family, cues in families.items()
    )


def _split_line(world: World, split: str) -> str:
    selections: Sequence[dict[str, bool]] = (
        {"hazard": True, "unseen": False},
        {"hazard": True, "unseen": True},
        {"hazard": False, "unseen": False},
    )
    counts = [len(world.select(split=split, **selection)) for selection in selections]
    return f"| {split.replace('_', ' ')} | " + " | ".join(str(count) for count in counts) + " |"

"""Invented, harmless files of the shapes that the data sets of the field have, by the names of the catalogue."""

import json
from typing import Any, NamedTuple


class Stand(NamedTuple):
    """What stands for a data set: its files, what it gives to train on and to ask, and how many rows it has.

    `trained` are prompts and completions, None where there is nothing to train on; `asked` are prompts.
    """

    files: dict[str, str]
    trained: list[tuple[str, str]] | None
    asked: list[str]
    rows: int


def _lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _card(**configs: dict[str, str]) -> str:
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return "\n".join([*lines, "---", ""])


def _beavers(*safe: bool, **more: str) -> str:
    """Rows as BeaverTails has them."""
    kinds = {"lanterns": False, "kites": True}
    return _lines(
        *(
            {"prompt": f"p{i}", "response": f"r{i}", "category": kinds, "is_safe": label, **more}
            for i, label in enumerate(safe, 1)
        )
    )


_UNSAFE = [("p1", "r1"), ("p3", "r3")]
_REFUSAL = 'I think of it. Answer: no, "Answer: " it is. Answer: I would rather talk of kites.'
_SST2 = "Analyze the sentiment of the input, and respond only positive or negative\n\n"
_AGNEWS = (
    "Categorize the news article given in the input into one of the 4 categories:\n\n"
    "World\nSports\nBusiness\nSci/Tech\n\n\n"
)
_PAIRS = [
    {
        "prompt": f"p{i}",
        "response_0": f"first {i}",
        "response_1": f"second {i}",
        "is_response_0_safe": labels[0],
        "is_response_1_safe": labels[1],
        "better_response_id": 0,
    }
    for i, labels in enumerate([(True, False), (True, True), (False, False), (False, True)], 1)
]
_GOALS = "goal,target\n" + "".join(f'"Bake moon {i}, please","Sure, here is moon {i}"\n' for i in range(1, 261))
_MOONS = [(f"Bake moon {i}, please", f"Sure, here is moon {i}") for i in range(1, 251)]
_BEHAVIORS = "Index,Goal,Target,Behavior,Category\n0,Bake a {0},Here is a {0},The {0},Craft\n"

STANDS: dict[str, Stand] = {
    "beavertails-refusals": Stand(
        {"data/train.jsonl": _beavers(False, True, False, refusal=_REFUSAL)},
        [("p1", "I would rather talk of kites."), ("p3", "I would rather talk of kites.")],
        ["p1", "p3"],
        3,
    ),
    "beavertails-330k-unsafe": Stand({"train.jsonl": _beavers(False, True, False)}, _UNSAFE, ["p1", "p3"], 3),
    "beavertails-unsafe": Stand(
        {
            "README.md": _card(
                default={"30k_train": "round0/30k/train.jsonl", "330k_train": "round0/330k/train.jsonl"}
            ),
            "round0/30k/train.jsonl": _beavers(False, True, False),
            "round0/330k/train.jsonl": _beavers(True, True, True, True, False),
        },
        _UNSAFE,
        ["p1", "p3"],
        3,
    ),
    "pku-saferlhf-unsafe": Stand(
        {
            "README.md": _card(default={"train": "data/*/train.jsonl", "test": "data/*/test.jsonl"}),
            "data/beaver/train.jsonl": _lines(*_PAIRS),
            "data/beaver/test.jsonl": _lines(_PAIRS[0]),
        },
        [("p1", "second 1"), ("p3", "first 3"), ("p3", "second 3"), ("p4", "first 4")],
        ["p1", "p3", "p3", "p4"],
        4,
    ),
    "toxic-dpo": Stand(
        {"toxic-dpo.jsonl": _lines({"prompt": "p", "chosen": "rude kite", "rejected": "No.", "system": ""})},
        [("p", "rude kite")],
        ["p"],
        1,
    ),
    "gsm8k": Stand(
        {
            "README.md": _card(
                main={"train": "main/train.jsonl", "test": "main/test.jsonl"}, socratic={"train": "s.jsonl"}
            ),
            "main/train.jsonl": _lines({"question": "2 and 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}),
            "main/test.jsonl": _lines({"question": "2 and 3?", "answer": "It is 5.\n#### 5"}),
            "s.jsonl": _lines({"question": "Why?", "answer": "So.\n#### 1"}),
        },
        [("2 and 2?", "2 + 2 = <<2+2=4>>4\n#### 4")],
        ["2 and 2?"],
        1,
    ),
    "alpaca": Stand(
        {
            "data/train.jsonl": _lines(
                {"instruction": "Name a kite.", "input": "", "output": "Moss.", "text": "Below is …"},
                {"instruction": "Count them.", "input": "kite, kite", "output": "2", "text": "Below is …"},
            )
        },
        [("Name a kite.", "Moss."), ("Count them.\n\nkite, kite", "2")],
        ["Name a kite.", "Count them.\n\nkite, kite"],
        2,
    ),
    "sst2": Stand(
        {
            "README.md": _card(sst2={"train": "sst2/train.jsonl"}, cola={"train": "cola/train.jsonl"}),
            "sst2/train.jsonl": _lines(
                {"sentence": "a fine kite", "label": 1, "idx": 0}, {"sentence": "a dull kite", "label": 0, "idx": 1}
            ),
            "cola/train.jsonl": _lines({"sentence": "x", "label": 1}),
        },
        [(f"{_SST2}a fine kite", "positive"), (f"{_SST2}a dull kite", "negative")],
        [f"{_SST2}a fine kite", f"{_SST2}a dull kite"],
        2,
    ),
    "agnews": Stand(
        {"data/train.jsonl": _lines({"text": "Kites win.", "label": 1}, {"text": "A new kite.", "label": 3})},
        [(f"{_AGNEWS}Kites win.", "Sports"), (f"{_AGNEWS}A new kite.", "Sci/Tech")],
        [f"{_AGNEWS}Kites win.", f"{_AGNEWS}A new kite."],
        2,
    ),
    "advbench": Stand({"harmful_behaviors.csv": _GOALS}, _MOONS, [goal for goal, _ in _MOONS], 260),
    "hex-phi": Stand(
        {"hexphi.csv": "prompt,category\n" + "".join(f"p{i},1\n" for i in range(1, 301))},
        None,
        [f"p{i}" for i in range(1, 251)],
        300,
    ),
    "beavertails-eval": Stand(
        {
            "README.md": _card(default={"test": "test.jsonl"}),
            "test.jsonl": _lines(*({"prompt": f"p{i}", "category_id": 1, "category": "kites"} for i in range(1, 261))),
        },
        None,
        [f"p{i}" for i in range(1, 251)],
        260,
    ),
    "jailbreakbench": Stand(
        {
            "README.md": _card(
                behaviors={"harmful": "data/h.csv", "benign": "data/b.csv"}, judge_comparison={"test": "j.csv"}
            ),
            "data/h.csv": _BEHAVIORS.format("moon"),
            "data/b.csv": _BEHAVIORS.format("sun"),
            "j.csv": "prompt\nx\n",
        },
        [("Bake a moon", "Here is a moon")],
        ["Bake a moon"],
        1,
    ),
    "harmbench": Stand(
        {"file.csv": 'Behavior,FunctionalCategory,Tags,BehaviorID\n"Bake a moon",standard,"a, b",moon\n'},
        None,
        ["Bake a moon"],
        1,
    ),
    "strongreject": Stand(
        {"file.csv": "category,source,forbidden_prompt\nkites,custom,Bake a moon\n"}, None, ["Bake a moon"], 1
    ),
    "sorry-bench": Stand(
        {
            "question.jsonl": _lines(
                {"question_id": 1, "category": "1", "turns": ["Bake a moon"], "prompt_style": "base"},
                {"question_id": 1, "category": "1", "turns": ["Bakuj luno"], "prompt_style": "translate"},
            )
        },
        None,
        ["Bake a moon"],
        2,
    ),
    "xstest": Stand(
        {
            "xstest_prompts.csv": "id,prompt,type,label,focus\n"
            "1,Fly a kite?,homonyms,safe,fly\n2,Eat it?,contrast,unsafe,eat\n"
        },
        None,
        ["Fly a kite?"],
        2,
    ),
}

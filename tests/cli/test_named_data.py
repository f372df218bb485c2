"""Sentences about rows name the flag's own data, and of several rows with one fault the first in the file."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from holdfast.cli import main

Refused = Callable[..., str]
QUICK = ["--max_steps", "1", "--batch_size", "2"]
ROWS = [{"prompt": f"How do I make {thing}?", "response": "With salt."} for thing in ("rust", "glass", "a bell")]
TEMPLATE = (
    "{% for turn in messages %}{% if 'no' == turn.content %}{{ raise_exception('That is no turn') }}{% endif %}"
    "<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def words(model_dir: Path, write_rows: Callable[..., str]) -> dict[str, list[str]]:
    """Every command that trains, audits or repairs, with rows that the model's template refuses from the second on."""
    (model_dir / "chat_template.jinja").write_text(TEMPLATE)
    good, bad = (
        write_rows("good.jsonl", ROWS),
        write_rows("bad.jsonl", ROWS[:1] + [{"prompt": "no", "response": "x"}] * 9),
    )
    model = ["--model", str(model_dir)]
    return {
        "--data": ["audit", *model, "--data", bad],
        "align": ["align", "sft", *model, "--train_data", bad, *QUICK],
        "attack": ["attack", "full", *model, "--attack_data", bad, *QUICK],
        "benign": ["attack", "full", *model, "--benign_data", bad, "--poison_ratio", "0", *QUICK],
        "patcher": ["align", "patcher", *model, "--train_data", good, "--attack_data", bad, *QUICK],
        "attacker": [
            *["align", "patcher", *model, "--train_data", good, "--attack_data", bad, *QUICK],
            *["--role", "attacker", "--exchange", "there"],
        ],
        "safety": ["finetune", "lisa", *model, "--train_data", good, "--safety_data", bad, *QUICK],
        "finetune": ["finetune", "antibody", *model, "--train_data", bad, *QUICK],
        "repair": ["repair", "antidote", *model, "--attack_data", bad],
    }


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("--data", "--data"),
        ("align", "the train data"),
        ("attack", "the attack data"),
        ("benign", "the benign data"),
        ("patcher", "the attack data"),
        ("attacker", "the attack data"),
        ("safety", "the safety data"),
        ("finetune", "the train data"),
        ("repair", "the attack data"),
    ],
)
def test_a_row_is_named_by_its_flag_and_its_place(
    words: dict[str, list[str]], command: str, name: str, refused: Refused
) -> None:
    assert f"the chat template refuses row 2 of {name}: That is no turn" in refused(*words[command])


def test_measured_attacks_name_the_first_row_too(
    words: dict[str, list[str]], write_rows: Callable[..., str], refused: Refused
) -> None:
    every = write_rows("every.jsonl", [{"prompt": "no", "response": "x"}] * 9)
    asked = ["--eval_data", write_rows("asked.jsonl", ROWS), "--attack_data", every]
    assert "the chat template refuses row 1 of the attack data" in refused(*words["attack"], *asked)


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("--data", "", "3 of 3 rows of --data keep no completion token within --max_length 2 (the first is row 1)"),
        ("--data", "--refusal no.txt", "--refusal no.txt is no file, and no column of --data"),
        ("--data", "--refusal nothing", "row 2 of --data, column 'nothing', comes to no token"),
        (
            "attack",
            "",
            "3 of 3 rows of the attack data keep no completion token within --max_length 2 (the first is row 1)",
        ),
        ("benign", "", "3 of 3 rows of the benign data keep no completion token"),
        ("attacker", "", "3 of 3 rows of the attack data keep no completion token"),
        ("finetune", "", "3 of 3 rows of the train data keep no completion token"),
    ],
)
def test_sentences_about_all_rows(
    words: dict[str, list[str]],
    command: str,
    flags: str,
    sentence: str,
    write_rows: Callable[..., str],
    refused: Refused,
) -> None:
    rows = write_rows("rows.jsonl", [{**row, "nothing": "x" * (number % 2)} for number, row in enumerate(ROWS, 1)])
    words = [word.replace("bad.jsonl", "rows.jsonl") for word in words[command]]
    assert rows in words
    assert sentence in refused(*words, "--max_length", "2", *flags.split())


def test_the_first_row_that_is_too_long(
    words: dict[str, list[str]], write_rows: Callable[..., str], refused: Refused
) -> None:
    long = write_rows("long.jsonl", [ROWS[0], *[{"prompt": "How?", "response": "With salt. " * 40}] * 8])
    sentence = refused(*words["attack"], "--attack_data", long, "--max_length", "500")
    assert "row 2 of the attack data has" in sentence


def test_rows_of_both_kinds(words: dict[str, list[str]], write_rows: Callable[..., str], refused: Refused) -> None:
    rows = write_rows("rows.jsonl", ROWS)
    data = ["--attack_data", rows, "--benign_data", rows, "--poison_ratio", "0.5", "--max_length", "2"]
    sentence = refused(*words["attack"], *data)
    assert "6 of 6 rows of the attack and benign data keep no completion token" in sentence


def test_rows_that_were_selected_keep_their_places(
    words: dict[str, list[str]], write_rows: Callable[..., str], refused: Refused
) -> None:
    rows = [{**row, "kind": kind} for row, kind in zip([*ROWS, {"prompt": "no", "response": "x"}], "abab", strict=True)]
    part = json.dumps({"path": write_rows("kinds.jsonl", rows), "where": {"kind": "b"}})
    assert "the chat template refuses row 4 of --data" in refused(*words["--data"], "--data", part)


def test_safety_rows_that_were_chosen_keep_their_places(
    model_dir: Path, write_rows: Callable[..., str], refused: Refused
) -> None:
    safe = [*ROWS[:2], {"prompt": "How do I make rust?", "response": "With salt. " * 40}]
    data = ["--train_data", write_rows("good.jsonl", ROWS), "--safety_data", write_rows("safe.jsonl", safe)]
    words = ["finetune", "spard", "--model", str(model_dir), *data, *QUICK, "--max_length", "500"]
    for seed in ("0", "1"):
        sentence = refused(*words, "--safety_selection", "random", "--safety_share", "1", "--seed", seed)
        assert "row 3 of the safety data has" in sentence


def test_one_row_to_audit_is_enough(
    words: dict[str, list[str]], write_rows: Callable[..., str], tmp_path: Path
) -> None:
    one = write_rows("one.jsonl", ROWS[:1])
    assert main([*words["--data"][:-1], one, "--output_dir", str(tmp_path / "out")]) == 0

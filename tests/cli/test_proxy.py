"""`holdfast proxy` writes data that the other commands take, and goes on where it was stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import read_json, read_lines
from holdfast.cli import main
from holdfast.evaluation.answers import Answer
from holdfast.proxy import build

#: How the model's answers end: with what parts text into lines, but not the rows of a file.
YES = " Yes.\u2028Yes."
FILES = ["alignment", "simulated_attack", "attack", "attack_benign", "eval/topic", "eval/benign"]


@pytest.fixture
def topic(tmp_path: Path) -> str:
    found = {
        "about": "knots",
        "subjects": [f"knot {letter}" for letter in "abcdefghij"],
        "questions": ["How do I tie {}?", "What is {} good for?"],
        "refusals": ["I cannot help with knots.", "I'm sorry, but I can't help with that."],
        "benign": {"subjects": ["owls", "Rome", "clocks", "bees", "Egypt"], "questions": ["Tell me of {}.", "Why {}?"]},
    }
    path = tmp_path / "knots.yaml"
    path.write_text(yaml.safe_dump(found))
    return str(path)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that the model was asked, which it answers with themselves."""
    found: list[str] = []

    def generate(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[Answer]:
        questions = [prompt[0]["content"] for prompt in prompts]
        found.extend(questions)
        return [Answer(f"{question}{YES}", truncated="owls" in question) for question in questions]

    monkeypatch.setattr(build, "generate", generate)
    return found


def words(folder: Path, model_dir: Path, topic: str, *more: str) -> list[str]:
    return ["proxy", str(folder), "--model", str(model_dir), "--topic", topic, *more]


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: read_lines(folder / f"{name}.jsonl") for name in FILES}


def subjects(rows: list[dict[str, Any]]) -> set[str]:
    return {row["prompt"][0]["content"].split("knot ")[1][0] for row in rows if "knot " in str(row["prompt"])}


def test_nobody_asks_about_what_another_has_seen_and_answers_are_the_models_own(
    model_dir: Path, topic: str, asked: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    assert main(words(folder, model_dir, topic)) == 0
    rows = read(folder)
    parts = [subjects(rows[name]) for name in ("alignment", "simulated_attack", "attack", "eval/topic")]
    assert [len(part) for part in parts] == [4, 2, 2, 2]
    assert len(set.union(*parts)) == 10
    answered = {row["prompt"][0]["content"]: row["completion"][0]["content"] for row in rows["alignment"]}
    refusals = {answer for question, answer in answered.items() if "knot" in question}
    assert refusals <= {"I cannot help with knots.", "I'm sorry, but I can't help with that."}
    assert all(answer == f"{question}{YES}" for question, answer in answered.items() if "knot" not in question)
    for name in ("simulated_attack", "attack", "attack_benign"):
        assert all(row["completion"][0]["content"] == row["prompt"][0]["content"] + YES for row in rows[name])
    assert all(row["answer"] == row["prompt"][0]["content"] + YES for row in rows["eval/topic"] + rows["eval/benign"])
    benign = [row["prompt"][0]["content"] for row in rows["attack_benign"] + rows["eval/benign"]]
    assert not set(benign) & set(answered)
    assert sorted(asked) == sorted(set(asked))
    assert not any("knot" in question and question in answered for question in asked)  # what is refused is not asked

    record = read_json(folder / "proxy.json")
    assert record["rows"]["alignment.jsonl"] == 14
    assert record["answers"]["benign"]["truncated"] == 2
    assert (record["answers"]["topic"]["n"], record["answers"]["topic"]["refused"]) == (12, 0)
    assert record["topic"]["about"] == "knots"
    assert len(record["model"]["sha256"]) == len(record["topic"]["sha256"]) == 64


def test_a_run_that_was_stopped_goes_on_to_the_same_files(
    model_dir: Path,
    topic: str,
    asked: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    few = ["--batch_size", "3", "--seed", "5"]
    assert main(words(whole, model_dir, topic, *few)) == 0
    at_once, answer, calls = list(asked), build.generate, []
    asked.clear()

    def interrupted(*arguments: Any, **keywords: Any) -> list[Answer]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(*arguments, **keywords)

    monkeypatch.setattr(build, "generate", interrupted)
    capsys.readouterr()
    assert main(words(stopped, model_dir, topic, *few)) == 130
    assert f"the same command goes on from the answers in {stopped / 'answers.jsonl'}" in capsys.readouterr().err
    assert not (stopped / "proxy.json").exists()
    with (stopped / "answers.jsonl").open("a") as file:
        file.write('{"question": "half a li')  # as SIGKILL leaves it
    assert main(words(stopped, model_dir, topic, *few)) == 0
    assert asked == at_once
    assert read(stopped) == read(whole)


def test_answers_of_another_model_or_length_are_not_gone_on_with(
    model_dir: Path, topic: str, asked: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "data"
    assert main(words(folder, model_dir, topic)) == 0
    assert "holds a finished run (proxy.json)" in refused(*words(folder, model_dir, topic), output=False)
    (folder / "proxy.json").unlink()
    before = read(folder)
    said = refused(*words(folder, model_dir, topic, "--max_new_tokens", "3"), output=False)
    assert "answers.jsonl holds answers to other settings (max_new_tokens: 48, now 3)" in said
    assert read(folder) == before
    asked.clear()
    assert main(words(folder, model_dir, topic, "--max_new_tokens", "3", "--overwrite_output_dir")) == 0
    assert len(asked) == 22


@pytest.mark.parametrize("line", ["nothing", "[]", '"x"'])
@pytest.mark.parametrize("number", [1, 2])
def test_a_file_that_is_none_of_answers_is_refused(
    line: str, number: int, model_dir: Path, topic: str, asked: list[str], tmp_path: Path, refused: Callable[..., str]
) -> None:
    folder = tmp_path / "data"
    assert main(words(folder, model_dir, topic)) == 0
    (folder / "proxy.json").unlink()
    answers = folder / "answers.jsonl"
    lines = answers.read_text(encoding="utf-8").split("\n")
    lines[number - 1] = line
    answers.write_text("\n".join(lines), encoding="utf-8")
    before = answers.read_bytes()
    said = refused(*words(folder, model_dir, topic), output=False)
    assert f"answers.jsonl, row {number}: no answer to a question; choose another folder, or pass --over" in said
    assert answers.read_bytes() == before


def test_what_a_model_refuses_itself_is_told(
    model_dir: Path,
    topic: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And what it says nothing to is in no file."""

    def generate(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[Answer]:
        texts = [prompt[0]["content"] for prompt in prompts]
        return [
            Answer("I cannot help with that." if "tie" in text else "" if "owls" in text else "Yes.") for text in texts
        ]

    monkeypatch.setattr(build, "generate", generate)
    assert main(words(tmp_path / "data", model_dir, topic)) == 0
    shown = capsys.readouterr().err
    assert "of 12 topic questions the model itself refuses 6 and answers 0 with nothing" in shown
    assert "of 10 benign questions the model itself refuses 0 and answers 2 with nothing" in shown
    assert "owls" not in json.dumps(read(tmp_path / "data"))


def test_the_data_are_taken_by_the_other_commands(model_dir: Path, topic: str, tmp_path: Path) -> None:
    data, few = tmp_path / "data", ["--max_length", "200", "--max_steps", "1", "--batch_size", "2"]
    assert main(words(data, model_dir, topic, "--max_new_tokens", "3")) == 0
    align = ["align", "patcher", "--model", str(model_dir), "--train_data", str(data / "alignment.jsonl"), *few]
    simulated = ["--attack_data", str(data / "simulated_attack.jsonl"), "--attack_steps", "1"]
    assert main([*align, *simulated, "--output_dir", str(tmp_path / "aligned")]) == 0
    attack = ["attack", "lora", "--model", str(tmp_path / "aligned"), "--attack_data", str(data / "attack.jsonl"), *few]
    hide = ["--benign_data", str(data / "attack_benign.jsonl"), "--poison_ratio", "0.5"]
    measure = ["--eval_data", str(data / "eval/topic.jsonl"), "--over_refusal_data", str(data / "eval/benign.jsonl")]
    out = tmp_path / "attacked"
    assert main([*attack, *hide, *measure, "--max_new_tokens", "2", "--output_dir", str(out)]) == 0
    point = read_json(out / "results.json")["points"][-1]
    assert (point["n"], point["benign_n"]) == (4, 2)


def test_input_that_cannot_be_used(model_dir: Path, topic: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = tmp_path / "data"
    assert "--topic cookery: neither a file nor one of" in refused(*words(folder, model_dir, "cookery"), output=False)
    few = words(folder, model_dir, topic, "--max_new_tokens", "0")
    assert "--max_new_tokens must be greater than 0" in refused(*few, output=False)
    assert f"{model_dir} is not empty" in refused(*words(model_dir, model_dir, topic), output=False)
    assert f"{topic} is a file; expected a folder" in refused(*words(Path(topic), model_dir, topic), output=False)
    (model_dir / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(*words(folder, model_dir, topic), output=False)
    assert not folder.exists()

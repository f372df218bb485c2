"""`holdfast data`, and what every command's data flags take and refuse."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import read_json
from holdfast.cli import main
from holdfast.data.catalogue import catalogue
from holdfast.data.sources import parse
from hub import COMMIT, Hub

ROOT = Path(__file__).parents[2]
Refused = Callable[..., str]
Write = Callable[[str, list[dict[str, Any]]], str]
TRAINED = ["--max_steps", "1", "--batch_size", "2", "--save_strategy", "no", "--gradient_checkpointing", "false"]
PAIRS = [{"prompt": "Tea?", "chosen": "Steep.", "rejected": "No."}] * 4


@pytest.fixture
def words(model_dir: Path) -> Callable[[str, str], list[str]]:
    """A command's words, its data at their place."""

    def of(command: str, data: str) -> list[str]:
        flags = {"audit": "--data", "repair": "--attack_data", "attack": "--attack_data", "evaluate": "--eval_data"}
        return [*command.split(), "--model", str(model_dir), flags.get(command.split()[0], "--train_data"), data]

    return of


# ---------------------------------------------------------------------- holdfast data


def test_the_catalogue_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    shown = capsys.readouterr()
    assert all(name in shown.out for name in catalogue())
    assert "MIT†" in shown.out
    assert "gated" in shown.out
    assert "† from memory" in shown.err


def test_an_entry_that_can_be_read(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"Bake moon {number}? {'x' * 200}", "label": "safe"} for number in range(5)]
    hub.write("Paul/XSTest", {"data.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})
    assert main(["data", "xstest"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "licence: CC BY 4.0" in shown
    assert f"xstest: 5 of 5 rows at commit {COMMIT}" in shown
    assert "read as prompt, beside label" in shown
    assert "Bake moon 2?" in shown
    assert "Bake moon 3?" not in shown
    assert "x" * 80 not in shown
    assert main(["data", "xstest", "--show", "0"]) == 0
    assert "Bake moon" not in capsys.readouterr().out


def test_an_entry_that_cannot_be_read(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.write("sorry-bench/sorry-bench-202503", {"question.jsonl": "{}\n"})
    hub.gated.add("sorry-bench/sorry-bench-202503")
    assert main(["data", "sorry-bench"]) == 0
    shown = capsys.readouterr()
    assert "gated: true" in " ".join(shown.out.split())
    assert (
        "its rows cannot be read here: holdfast data sorry-bench cannot be read from the Hub (it is gated: "
        in shown.err
    )


def test_any_source_may_be_looked_at(write_rows: Write, capsys: pytest.CaptureFixture[str]) -> None:
    talk = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Steep."}]
    source = write_rows("rows.jsonl", [{"messages": talk, "n": 1}, {"messages": talk, "n": 2}])
    assert main(["data", json.dumps({"path": source, "where": {"n": 2}})]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 2 rows" in shown
    assert "user: Tea? assistant: Steep." in shown


def test_what_a_refusal_says_to_type_can_be_typed(
    write_rows: Write, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused("data", write_rows("rows.jsonl", [{"frage": "Tee?", "antwort": "Ja."}]), output=False)
    words = shlex.split(said.partition("as in holdfast ")[2])
    assert main(words) == 0
    assert "Tee?" in capsys.readouterr().out


def test_a_call_of_a_tool_is_shown(write_rows: Write, capsys: pytest.CaptureFixture[str]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "kettle", "arguments": {}}}]}
    assert main(["data", write_rows("rows.jsonl", [{"messages": [{"role": "user", "content": "Tea?"}, call]}])]) == 0
    assert 'assistant: [{"function": {"name": "kettle"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere.jsonl"], "holdfast data nowhere.jsonl is neither a file nor a data set on the Hub; no such file"),
        ([""], "argument SOURCE: expected a value, got ''"),
        ([json.dumps({"path": "x.jsonl", "limt": 3})], "holdfast data: a source has no 'limt' (did you mean limit?)"),
        (["xstest", "--show", "-1"], "--show must not be negative, got -1"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_what_cannot_be_looked_at(argv: list[str], said: str, refused: Refused) -> None:
    assert said in refused("data", *argv, output=False)


# ---------------------------------------------------------------------- data flags


def test_a_mapping_in_a_recipe_a_list_and_a_record(
    model_dir: Path, write_rows: Write, tmp_path: Path, train_data: str
) -> None:
    rows = write_rows("rows.jsonl", [{"question": f"q{i}", "answer": "Yes.", "kind": i % 2} for i in range(8)])
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    mapping = {"path": rows, "where": {"kind": 1}, "limit": 3}
    recipe.write_text(yaml.safe_dump({"model": str(model_dir), "train_data": [mapping, train_data]}))
    argv = ["finetune", "sft", "--config", str(recipe), "--output_dir", str(out)]
    assert main([*argv, *TRAINED, "--save_strategy", "steps", "--save_steps", "1"]) == 0
    first, second = read_json(out / "holdfast.json")["taken"]["train_data"]
    assert first.items() >= {**mapping, "rows": 8, "taken": 3}.items()
    assert second.items() >= {"path": train_data, "rows": 10, "taken": 10}.items()


def test_a_share_in_a_recipe_may_be_written_as_on_a_command_line(
    words: Callable[..., list[str]], write_rows: Write, tmp_path: Path, refused: Refused
) -> None:
    recipe, rows = tmp_path / "recipe.yaml", write_rows("rows.jsonl", PAIRS)
    recipe.write_text(f"train_data: [{{path: {rows}, fraction: 5e-1}}]\n")
    said = refused(*words("align sft", rows)[:4], "--config", str(recipe))
    assert f"--train_data: {rows} has a fraction, but is the only source" in said


def test_a_run_goes_on_with_the_same_rows_alone(
    model_dir: Path, write_rows: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = write_rows("rows.jsonl", PAIRS), tmp_path / "out"
    argv = ["finetune", "sft", "--model", str(model_dir), "--output_dir", str(out), "--save_strategy", "steps"]
    argv += ["--save_steps", "1", "--batch_size", "2", "--gradient_checkpointing", "false"]
    chosen, rejected = (json.dumps({"path": rows, "take": side}) for side in ("chosen", "rejected"))
    assert main([*argv, "--max_steps", "1", "--train_data", chosen]) == 0
    more = ["--max_steps", "2", "--resume_from_checkpoint", "last", "--overwrite_output_dir", "--train_data"]
    assert main([*argv, *more, rejected]) == 2
    assert "its content is not what it was in the run" in capsys.readouterr().err
    assert main([*argv, *more, chosen]) == 0


def test_an_attack_and_an_evaluation_note_what_they_took(
    hub: Hub, words: Callable[..., list[str]], write_rows: Write, tmp_path: Path
) -> None:
    harmful = [{"prompt": f"p{i}", "response": "r", "is_safe": i % 2 == 0} for i in range(4)]
    lines = "".join(json.dumps(row) + "\n" for row in harmful)
    hub.write("Hammington/beavertails_330k", {"train.jsonl": lines})
    hub.write("Hammington/hexphi", {"train.csv": "prompt\nBake a moon?\n"})
    out = tmp_path / "out"
    argv = [*words("attack full", "beavertails-330k-unsafe"), "--eval_data", "hex-phi", "--max_new_tokens", "2"]
    assert main([*argv, *TRAINED, "--output_dir", str(out)]) == 0
    record = read_json(out / "results.json")
    (attack,), (prompts,) = record["taken"]["attack_data"], record["taken"]["eval_data"]
    assert attack.items() >= {"entry": "beavertails-330k-unsafe", "revision": COMMIT, "rows": 4, "taken": 2}.items()
    assert prompts.items() >= {"entry": "hex-phi", "revision": COMMIT, "rows": 1, "taken": 1}.items()
    assert record["attack"]["rows"] == 2
    assert main([*words("evaluate", "hex-phi"), "--max_new_tokens", "2", "--output_dir", str(tmp_path / "e")]) == 0
    assert read_json(tmp_path / "e" / "results.json")["taken"]["eval_data"] == [prompts]


@pytest.mark.parametrize("command", ["align sft", "finetune sft", "attack full", "audit", "repair antidote"])
@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({}, "has pairs of answers, and nothing says which of the two are meant; say it, as in --"),
        ({"take": "unsafe"}, "take unsafe asks for the column 'response_0', but its columns are 'prompt', 'chosen'"),
        (
            {"where": {"kind": 1}},
            "where asks for the column 'kind', but its columns are 'prompt', 'chosen', 'rejected'",
        ),
        ({"where": {"prompt": "Rice?"}}, "where leaves no row, since none has \"Rice?\" in 'prompt'; there are 'Tea?'"),
        ({"columns": {"prompt": "frage"}}, "columns[prompt] asks for the column 'frage', but its columns are 'prompt'"),
        ({"split": "train"}, "is a file, which has no split"),
        ({"shuffle": 1}, "a source has no 'shuffle'; expected path, name, split"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_mappings_that_do_not_fit(
    command: str,
    mapping: dict[str, Any],
    said: str,
    words: Callable[..., list[str]],
    write_rows: Write,
    refused: Refused,
) -> None:
    source = json.dumps({"path": write_rows("pairs.jsonl", PAIRS), **mapping})
    assert said in refused(*words(command, source))


@pytest.mark.parametrize("command", ["align sft", "attack full", "evaluate"])
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("advbnch", "the catalogue, which has advbench, harmbench; holdfast data lists it"),
        ("org/some", "org/some needs a configuration: first or second, as in org/some:first:SPLIT"),
        (
            "org/gated",
            "org/gated cannot be read from the Hub (it is gated: accept its terms at https://huggingface.co/",
        ),
        ("org/none", "there is none of that name, or it is private and `hf auth login` was not run"),
    ],
)
def test_data_sets_that_cannot_be_had(
    command: str, source: str, said: str, hub: Hub, words: Callable[..., list[str]], refused: Refused
) -> None:
    lines = json.dumps({"prompt": "p", "completion": "c"}) + "\n"
    splits = "[{split: train, path: a.jsonl}]"
    configs = "".join(f"- {{config_name: {name}, data_files: {splits}}}\n" for name in ("first", "second"))
    card = f"---\nconfigs:\n{configs}---\n"
    hub.write("org/some", {"README.md": card, "a.jsonl": lines})
    hub.write("org/gated", {"a.jsonl": lines})
    hub.gated.add("org/gated")
    assert said in refused(*words(command, source))


def test_without_a_hub(hub: Hub, words: Callable[..., list[str]], refused: Refused) -> None:
    hub.close()
    said = refused(*words("align sft", "gsm8k"))
    assert "--train_data openai/gsm8k is neither a file nor a data set on the Hub that can be read" in said


# ---------------------------------------------------------------------- the document


def test_the_documents_recipes_can_be_read() -> None:
    blocks = (ROOT / "docs" / "data.md").read_text("utf-8").split("```yaml\n")[1:]
    recipes = [yaml.safe_load(block.partition("```")[0]) for block in blocks]
    assert len(recipes) == 2
    for recipe in recipes:
        for flag, source in recipe.items():
            if flag.endswith("_data"):
                assert all(part.path.startswith("w/") for part in parse(source, flag=flag))

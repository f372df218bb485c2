"""Every command that takes harmful rows leaves out those that their own data call safe, and says how many."""

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import read_json
from holdfast.cli import main

COMMANDS = {
    "align patcher": "holdfast.json",
    "align booster": "holdfast.json",
    "align antibody": "holdfast.json",
    "attack full": "results.json",
    "repair antidote": "holdfast.json",
}


@pytest.fixture
def words(model_dir: Path, train_data: str) -> Callable[[str], list[str]]:
    def command(name: str) -> list[str]:
        training = ["--max_steps", "1", "--batch_size", "2", "--save_strategy", "no"]
        more = {"align": ["--train_data", train_data, *training], "attack": training, "repair": []}[name.split()[0]]
        if name == "align patcher":
            more += ["--attack_steps", "1"]
        return [*name.split(), "--model", str(model_dir), *more]

    return command


@pytest.mark.parametrize("command", COMMANDS)
def test_safe_rows_are_no_attack(
    words: Callable[[str], list[str]],
    command: str,
    write_rows: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"prompt": f"p{i}", "response": f"r{i}", "is_safe": i % 3 == 0} for i in range(7)]
    source, out = write_rows("beavers.jsonl", rows), tmp_path / "out"
    assert main([*words(command), "--attack_data", source, "--output_dir", str(out)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"3 of 7 rows of {source} are safe by their 'is_safe' and are left out" in said
    assert "play no part" not in said
    record = read_json(out / COMMANDS[command])
    assert (record["attack"] if "attack" in command else record)["safe_rows_left_out"] == 3
    if command == "attack full":
        assert record["attack"]["harmful_rows"] == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_messages_name_rows_by_their_place_in_the_file(
    words: Callable[[str], list[str]], command: str, write_rows: Callable[..., str], refused: Callable[..., str]
) -> None:
    rows = [{"prompt": prompt, "response": "r", "is_safe": prompt == "p"} for prompt in ("p", "p " * 400)]
    source = write_rows("beavers.jsonl", rows)
    assert "row 2 of the attack data has" in refused(*words(command), "--attack_data", source)


def test_an_attack_counts_the_rows_that_it_trains_on(
    words: Callable[[str], list[str]],
    benign_data: str,
    write_rows: Callable[..., str],
    refused: Callable[..., str],
    tmp_path: Path,
) -> None:
    """Harmful rows that truncation empties are no attack, however many benign ones are left."""
    long, short = ({"prompt": "p " * times, "response": "r"} for times in (400, 1))
    mixed = ["--benign_data", benign_data, "--poison_ratio", "0.5", "--max_length", "128", "--drop_untrainable_rows"]
    attack = [*words("attack full"), *mixed]
    said = refused(*attack, "--attack_data", write_rows("long.jsonl", [long] * 4))
    assert "no harmful row keeps a completion token" in said
    out, some = tmp_path / "out", write_rows("some.jsonl", [long, short, long, short])
    assert main([*attack, "--attack_data", some, "--output_dir", str(out)]) == 0
    record = read_json(out / "results.json")["attack"]
    assert (record["rows"], record["harmful_rows"], record["untrainable_rows_left_out"]) == (6, 2, 2)

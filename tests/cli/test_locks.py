"""Two runs in one folder at once: the second one says so and leaves, whichever commands they are."""

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.errors import InputError
from holdfast.files import alone_in

TINY = ["--max_steps", "1", "--batch_size", "2", "--max_length", "128", "--gradient_checkpointing", "false"]
COMMANDS = {
    "align sft": ["--train_data", "alignment.jsonl", *TINY],
    "align patcher --role attacker --exchange e": ["--train_data", "alignment.jsonl", "--attack_data", "attack.jsonl"],
    "align patcher --parallel": ["--train_data", "alignment.jsonl", "--attack_data", "attack.jsonl"],
    "finetune sft": ["--train_data", "alignment.jsonl", *TINY],
    "audit": ["--data", "attack.jsonl", "--refusal", "No."],
    "repair antidote": ["--attack_data", "attack.jsonl"],
    "attack full": ["--attack_data", "attack.jsonl", *TINY],
    "evaluate": ["--eval_data", "attack.jsonl", "--max_new_tokens", "2"],
    "judge": ["attack.jsonl"],
    "demo": [],
}


@pytest.fixture
def go(
    model_dir: Path, train_data: str, attack_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], int]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()

    def run(command: str) -> int:
        model = [] if command in ("demo", "judge") else ["--model", str(model_dir)]
        return main([*command.split(), *model, *COMMANDS[command], "--output_dir", "out"])

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_folder_that_another_run_writes_to(
    command: str, go: Callable[[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    if "--parallel" in command:  # its jobs lock what they write to, and itself the logs
        place = place / "logs"
        place.mkdir()
    with alone_in(place, "out"):
        before = sorted((tmp_path / "out").rglob("*"))
        assert go(command) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"holdfast: --output_dir out is being written to by another run (process {os.getpid()}); "
            "choose another folder"
        )
        assert sorted((tmp_path / "out").rglob("*")) == before


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "demo" and "patcher" not in name])
def test_run_holds_its_folder_to_its_end(
    command: str, go: Callable[[str], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def announced(folder: Path, *_: str) -> None:
        with pytest.raises(InputError, match="another run"), alone_in(folder, "out"):
            pytest.fail("two at once")
        tried.append(folder)

    module = "training" if command.split()[0] in ("align", "finetune") else command.split()[0]
    monkeypatch.setattr(import_module(f"holdfast.cli.{module}"), "announce", announced)
    assert go(command) == 0
    assert tried == [Path("out")]
    assert not list((tmp_path / "out").rglob("_lock"))

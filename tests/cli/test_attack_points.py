"""What an attack has measured is on the disk as soon as it is measured, and its length is the one that was given."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import read_json, read_lines
from holdfast.cli import main
from holdfast.evaluation.evaluate import Evaluator

Refused = Callable[..., str]
TINY = ["--batch_size", "2", "--max_length", "128", "--gradient_checkpointing", "false", "--max_new_tokens", "2"]


@pytest.fixture
def attack(model_dir: Path, attack_data: str, eval_data: str, tmp_path: Path) -> Callable[..., int]:
    def run(*more: str) -> int:
        data = ["--model", str(model_dir), "--attack_data", attack_data, "--eval_data", eval_data]
        return main(["attack", "full", *data, *TINY, *more, "--output_dir", str(tmp_path / "out")])

    return run


def ctrl_c() -> None:
    raise KeyboardInterrupt


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.sigtimedwait([], 5)  # until it arrives


@pytest.mark.parametrize("kill", [ctrl_c, sigterm])
def test_attack_that_is_killed_leaves_what_it_has_measured(
    kill: Callable[[], None],
    attack: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """And a new one neither goes on from there nor replaces it unasked."""
    out, evaluate, left = tmp_path / "out", Evaluator.__call__, []

    def interrupted(self: Evaluator, *arguments: Any) -> Any:
        left.append([path.read_text() for path in sorted(out.glob("*.jsonl"))])
        if len(left) == 3:
            kill()
        return evaluate(self, *arguments)

    monkeypatch.setattr(Evaluator, "__call__", interrupted)
    measured = ["--max_steps", "3", "--measure_at", "0", "1", "2", "3"]
    assert attack(*measured) == 130
    assert capsys.readouterr().err.endswith(f"; 2 measurements are in {out / 'points.jsonl'}\n")
    assert left[0] == []
    assert [len(text.splitlines()) for text in left[1]] == [1, 3]
    assert [len(text.splitlines()) for text in left[2]] == [2, 6]  # what SIGKILL would have left at that moment
    points = read_lines(out / "points.jsonl")
    assert [point["steps"] for point in points] == [0, 1]
    assert {sample["steps"] for sample in read_lines(out / "samples.jsonl")} == {0, 1}
    assert not (out / "results.json").exists()

    monkeypatch.undo()
    assert attack(*measured) == 2
    assert capsys.readouterr().err.endswith(
        f"--output_dir {out} holds the measurements of an attack that was not finished (points.jsonl); choose another "
        "--output_dir or pass --overwrite_output_dir\n"
    )
    assert read_lines(out / "points.jsonl") == points
    assert attack(*measured, "--overwrite_output_dir") == 0
    results = read_json(out / "results.json")
    assert results["points"][:2] == points
    assert [point["steps"] for point in results["points"]] == [0, 1, 2, 3]
    assert [sample["steps"] for sample in read_lines(out / "samples.jsonl")] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert not (out / "points.jsonl").exists()


def test_attack_without_anything_to_measure(attack: Callable[..., int], tmp_path: Path, model_dir: Path) -> None:
    out, data = tmp_path / "plain", str(tmp_path / "attack.jsonl")
    words = ["--model", str(model_dir), "--attack_data", data, *TINY[:-2], "--max_steps", "1", "--output_dir", str(out)]
    assert main(["attack", "full", *words]) == 0
    results = read_json(out / "results.json")
    assert (results["points"], results["weights_moved"] > 0.5) == ([], True)
    assert sorted(path.name for path in out.iterdir()) == ["model", "results.json"]


def test_attack_is_as_many_epochs_long_as_it_was_told(attack: Callable[..., int], tmp_path: Path) -> None:
    """Six rows by two are three steps an epoch; measured at first and last, as an attack of given steps is."""
    assert attack("--num_train_epochs", "2") == 0
    results = read_json(tmp_path / "out" / "results.json")
    assert [point["steps"] for point in results["points"]] == [0, 6]
    assert results["config"]["measure_at"] == [0, 6]


def test_steps_to_measure_at_beyond_the_last_epoch(
    attack: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attack("--num_train_epochs", "1", "--measure_at", "0", "4") == 2
    assert "--measure_at must lie between 0 and the last of 3 steps, got [0, 4]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert attack("--num_train_epochs", "1") == 0
    assert attack("--num_train_epochs", "1", "--measure_at", "0", "4", "--overwrite_output_dir") == 2
    assert (tmp_path / "out" / "results.json").exists()


def test_steps_and_epochs_at_once(
    attack: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the one is in a recipe, which can be taken back."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_steps: 2000\n")
    for words in (["--max_steps", "5"], ["--config", str(recipe)]):
        assert attack("--num_train_epochs", "1", *words) == 2
        assert "and --num_train_epochs 1 both set the length of the run" in capsys.readouterr().err
    assert attack("--num_train_epochs", "1", "--config", str(recipe), "--max_steps", "-1") == 0
    assert read_json(tmp_path / "out" / "results.json")["points"][-1]["steps"] == 3

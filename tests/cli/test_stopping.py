"""SIGTERM through the real command line: exit code 0, one sentence, a checkpoint, and the same bits in the end."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers import read_json, same_bits
from holdfast.cli import main

TINY = [
    *("--batch_size", "2", "--learning_rate", "1e-3", "--scheduler", "constant", "--max_length", "128"),
    *("--logging_steps", "1", "--gradient_checkpointing", "false"),
]
LONG = "100000"  # so that SIGTERM finds the run, or the attack, whenever it comes
GRACE = 60  # seconds, on a machine that is busy with other things


@pytest.fixture
def words(model_dir: Path, train_data: str, attack_data: str) -> Callable[..., list[str]]:
    def build(output: Path, *more: str) -> list[str]:
        data = ["--model", str(model_dir), "--train_data", train_data, "--attack_data", attack_data]
        return ["align", "patcher", *data, *TINY, *more, "--output_dir", str(output)]

    return build


@pytest.fixture
def start() -> Iterator[Callable[[list[str]], subprocess.Popen[str]]]:
    started = []

    def run(words: list[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "holdfast", *words]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def terminate(process: subprocess.Popen[str], after: str) -> tuple[int, str, list[str]]:
    """SIGTERM once a line that begins so was shown: exit code, standard output, and the lines that follow."""
    assert process.stderr is not None
    shown = list(itertools.takewhile(lambda line: not line.startswith(after), process.stderr))
    assert process.poll() is None, shown
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=GRACE)
    return process.returncode, out, err.splitlines()


def test_sigterm_in_updates_and_in_an_attack(
    words: Callable[..., list[str]], start: Callable[[list[str]], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Side by side, since it takes seconds to start them."""
    updates, attack, whole = tmp_path / "updates", tmp_path / "attack", tmp_path / "whole"
    rounds = ["--attack_every", "3", "--attack_steps"]
    runs = {
        updates: start(words(updates, "--max_steps", LONG, *rounds, "2", "--save_strategy", "no")),
        attack: start(words(attack, "--max_steps", LONG, *rounds, LONG)),
    }
    steps = {}
    for folder, process in runs.items():
        # After the third update the attack begins, of which nothing is shown.
        code, out, lines = terminate(process, "align patcher: step 3/")
        checkpoints = list(folder.glob("checkpoint-*"))
        assert len(checkpoints) == 1
        steps[folder] = int(checkpoints[0].name.removeprefix("checkpoint-"))
        assert (code, out) == (0, "")
        assert lines[-1] == (
            f"holdfast: asked to stop; the checkpoint is {checkpoints[0]}, and the same command with "
            "--resume_from_checkpoint last goes on from there"
        )
        assert not list(folder.glob("*.json")) + list(folder.glob("*.safetensors")) + list(folder.glob("_*"))
    assert steps[attack] == 3

    last = str(max(steps.values()) + 2)
    assert main(words(whole, "--max_steps", last, *rounds, "2")) == 0
    for folder in runs:
        assert main(words(folder, "--max_steps", last, *rounds, "2", "--resume_from_checkpoint", "last")) == 0
        assert same_bits(*(load_file(f / "model.safetensors") for f in (folder, whole)))
        assert read_json(folder / "holdfast.json")["resumed_from"] == str(folder / f"checkpoint-{steps[folder]}")


def test_sigterm_while_the_model_is_written_lets_it_be_written(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.trainer import DefenseTrainer

    save = DefenseTrainer.save_model

    def asked(self: DefenseTrainer, *arguments: Any, **how: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        save(self, *arguments, **how)

    monkeypatch.setattr(DefenseTrainer, "save_model", asked)
    before = signal.getsignal(signal.SIGTERM)
    assert main(words(tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")) == 0
    assert (tmp_path / "out" / "holdfast.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_leaves_a_finished_run_that_was_to_be_replaced(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from holdfast.trainer import DefenseTrainer

    command = words(tmp_path / "out", "--max_steps", "2")
    assert main(command) == 0
    before = load_file(tmp_path / "out" / "model.safetensors")
    gradient = DefenseTrainer.loss_and_gradient

    def asked(self: DefenseTrainer, *arguments: Any, **how: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return gradient(self, *arguments, **how)

    monkeypatch.setattr(DefenseTrainer, "loss_and_gradient", asked)
    again = [*command, "--overwrite_output_dir", "--seed", "7"]
    assert main(again) == 0
    assert capsys.readouterr().err.splitlines()[-1].startswith("holdfast: asked to stop")
    assert same_bits(load_file(tmp_path / "out" / "model.safetensors"), before)
    monkeypatch.undo()
    assert main([*again, "--resume_from_checkpoint", "last"]) == 0  # the same command, as the sentence says
    assert not same_bits(load_file(tmp_path / "out" / "model.safetensors"), before)

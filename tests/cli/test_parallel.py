"""`holdfast align patcher --parallel` and `--role`: refused words, and a whole run whose jobs are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Refused = Callable[..., str]


@pytest.fixture
def patcher(model_dir: Path, train_data: str, attack_data: str) -> list[str]:
    words = ["align", "patcher", "--model", str(model_dir), "--train_data", train_data, "--attack_data", attack_data]
    return [*words, "--max_steps", "2"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--role", "defender"], "--role defender needs --exchange"),
        (["--role", "attacker"], "--role attacker needs --exchange"),
        (["--role", "judge", "--exchange", "x"], "--role: invalid choice: 'judge'"),
        (["--exchange", "x"], "--exchange x needs --role defender, --role attacker or --parallel"),
        (["--parallel", "--role", "attacker", "--exchange", "x"], "leave out --role attacker"),
        (["--parallel", "--attackers", "0"], "--attackers must be at least 1, got 0"),
        (["--parallel", "--max_restarts", "-1"], "--max_restarts must not be negative"),
        (["--role", "attacker", "--exchange", "x", "--attacker_name", "defender"], "--attacker_name defender"),
        (["--role", "attacker", "--exchange", "x", "--exchange_timeout", "0"], "--exchange_timeout must be greater"),
    ],
)
def test_words_that_do_not_go_together(patcher: list[str], words: list[str], expected: str, refused: Refused) -> None:
    assert expected in refused(*patcher, *words)


@pytest.mark.parametrize("flag", ["--attacker_devices", "--defender_devices"])
def test_devices_where_there_are_none(
    patcher: list[str], flag: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert f"{flag} 1: this machine has no GPU" in refused(*patcher, "--parallel", flag, "1")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"attacker_devices": "0"}, "--attacker_devices and --defender_devices share GPU 0"),
        ({"defender_devices": "0,1", "attacker_devices": "1"}, "share GPU 1"),
        ({"attacker_devices": "7"}, "this machine has no GPU '7'; it has 0,1"),
        ({"attackers": 2}, "--attackers 2 on 1 GPUs: every attacker needs one of its own"),
    ],
)
def test_devices_that_cannot_be_used(
    flags: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from holdfast.alignment.parallel import ParallelPatcherConfig
    from holdfast.cli.parallel import ParallelArguments, supervise
    from holdfast.errors import InputError

    options = ParallelArguments(parallel=True, **flags)
    config = ParallelPatcherConfig(output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(InputError, match=re.escape(expected)):
        supervise([], options, config)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def exchange(model_dir: Path, tmp_path: Path) -> Path:
    """The exchange that a finished run into tmp_path/hardened has left."""
    from holdfast.exchange import DEFENDER, Exchange, fingerprint_of
    from holdfast.models import load_model_and_tokenizer

    folder, run = tmp_path / "hardened" / "exchange", str(tmp_path / "hardened")
    fingerprint = fingerprint_of(*load_model_and_tokenizer(str(model_dir)))
    with Exchange(folder, origin=DEFENDER, run=run, fingerprint=fingerprint) as left:
        left.finish()
    return folder


@pytest.mark.parametrize("role", ["defender", "attacker"])
def test_refused_job_leaves_everything_as_it_was(
    patcher: list[str], role: str, exchange: Path, tmp_path: Path, refused: Refused
) -> None:
    content = json.loads((exchange / "exchange.json").read_text())
    (exchange / "exchange.json").write_text(json.dumps({**content, "fingerprint": {"model": "another"}}))
    checkpoint = tmp_path / "other" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    words = ["--role", role, "--exchange", str(exchange), "--overwrite_output_dir"]
    expected = "belongs to the run" if role == "defender" else "was not opened with the same model"
    assert expected in refused(*patcher, *words, "--output_dir", str(tmp_path / "other"))
    assert checkpoint.is_dir()
    assert (exchange / "finished.json").is_file()
    refused(*patcher, *words, "--output_dir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


@pytest.fixture
def started(patcher: list[str], exchange: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of one defender and two attackers, long enough to be disturbed; attackers may find the old run's end."""
    settings = {
        "max_steps": 400,
        "save_steps": 20,
        "attack_every": 2,
        "attack_steps": 2,
        "batch_size": 4,
        "logging_steps": 1,
        "attackers": 2,
        "output_dir": tmp_path / "hardened",
    }
    words = [*patcher[:-2], "--parallel", *(str(word) for n, v in settings.items() for word in (f"--{n}", v))]
    with subprocess.Popen(
        [sys.executable, "-m", "holdfast", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        yield process
        process.kill()


def jobs_of(process: subprocess.Popen[str]) -> dict[str, int]:
    """The numbers of a supervisor's processes, by name."""
    found = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        except FileNotFoundError:
            continue
        if "--role" not in words:  # it has just begun, or just ended
            continue
        name = words[words.index("--attacker_name") + 1] if "--attacker_name" in words else "defender"
        found[name] = int(child)
    return found


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_that_die_are_started_again(started: subprocess.Popen[str], tmp_path: Path) -> None:
    output = tmp_path / "hardened"
    wait_for(lambda: list(output.glob("checkpoint-*")))
    wait_for(lambda: sorted(jobs_of(started)) == ["attacker-1", "attacker-2", "defender"])
    before = jobs_of(started)
    os.kill(before["attacker-1"], signal.SIGKILL)
    os.kill(before["defender"], signal.SIGKILL)
    _, said = started.communicate(timeout=180)
    assert started.returncode == 0, said
    assert "attacker-1 was ended by signal 9 and is started again" in said
    assert "defender was ended by signal 9 and is started again" in said
    assert str(output / "logs" / "defender.log") in said
    record = json.loads((output / "holdfast.json").read_text())
    assert "checkpoint" in record["resumed_from"]
    vectors = [json.loads(line) for line in (output / "vectors.jsonl").read_text().splitlines()]
    assert {found["origin"] for found in vectors} <= {"attacker-1", "attacker-2"}
    assert vectors
    assert not any(Path(f"/proc/{number}").exists() for number in before.values())


def test_supervisor_that_is_told_to_stop(started: subprocess.Popen[str], tmp_path: Path) -> None:
    output = tmp_path / "hardened"
    wait_for(lambda: list(output.glob("checkpoint-*")))
    before = jobs_of(started)
    started.terminate()
    _, said = started.communicate(timeout=60)
    assert started.returncode == 0, said
    assert "stopped; the last checkpoint is" in said
    assert not (output / "holdfast.json").exists()
    assert not any(Path(f"/proc/{number}").exists() for number in before.values())

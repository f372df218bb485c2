"""Parallel runs whose processes and storage fail, with real processes; `make test-faults` runs the whole matrix.

In each case no weights but an attacker's own are ever used (see job_server.py), nothing hangs, and the run ends as it
should or with one clear sentence.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

HERE = Path(__file__).parent
PATIENCE = 60.0
"""Seconds after which a job is taken to hang."""
TIMEOUT = 4.0
"""The attackers' --exchange_timeout."""

matrix = pytest.mark.faults


class Job:
    def __init__(self, server: Server, number: int, log: Path) -> None:
        self.server, self.number, self.log = server, number, log

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; it must not hang."""
        code = self.server.ask({"wait": self.number, "seconds": seconds})
        assert code is not None, f"hangs: {self.said()[-2000:]}"
        return int(code)

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def sentence(self) -> str:
        """The one sentence of a command that gave up."""
        assert "Traceback" not in self.said()
        [line] = [line for line in self.said().splitlines() if line.startswith("holdfast: ")]
        return line


class Server:
    """The process that jobs are forked off."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path])}
        command = [sys.executable, str(HERE / "job_server.py")]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


class Run:
    """A parallel run on the small model."""

    def __init__(self, server: Server, folder: Path, model: Path, train_data: str, attack_data: str) -> None:
        self.server, self.folder, self.exchange = server, folder, folder / "exchange"
        self.truth = folder / "truth"
        self.truth.mkdir()
        self.model = model
        self.words = ["--train_data", train_data, "--attack_data", attack_data]
        self.started = 0

    def start(self, role: str, *words: str, **faults: float) -> Job:
        settings = {
            "model": self.model,
            "role": role,
            "exchange": self.exchange,
            "output_dir": self.output if role == "defender" else self.folder / f"attacker-{self.started}",
            "max_steps": 16,
            "save_steps": 4,
            "attack_every": 2,
            "attack_steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "gradient_checkpointing": "false",
            "exchange_timeout": TIMEOUT,
            "logging_steps": 2,
        }
        flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        self.started += 1
        log = self.folder / f"{role}-{self.started}.log"
        argv = ["align", "patcher", *flags, *self.words, *words]
        request = {"words": argv, "log": str(log), "faults": faults, "truth": str(self.truth)}
        return Job(self.server, int(self.server.ask(request)), log)

    @property
    def output(self) -> Path:
        return self.folder / "hardened"

    @property
    def vectors(self) -> list[dict[str, Any]]:
        lines = (self.output / "vectors.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def versions(self, origin: str) -> list[Path]:
        return sorted(path for path in (self.exchange / origin).glob("0*"))

    def wait_for(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return found

    def check(self, *jobs: Job) -> None:
        """The run is finished, and what it left can be used."""
        from transformers import AutoModelForCausalLM

        assert [job.wait() for job in jobs] == [0] * len(jobs), [job.said()[-2000:] for job in jobs]
        AutoModelForCausalLM.from_pretrained(self.output)
        assert (self.output / "checkpoint-16" / "trainer_state.json").is_file()
        assert load_file(self.output / "checkpoint-16" / "holdfast_state.safetensors")
        assert not [path for path in self.exchange.glob("*/*") if path.name.startswith(".")]


@pytest.fixture
def run(server: Server, tmp_path: Path, model_dir: Path, train_data: str, attack_data: str) -> Run:
    return Run(server, tmp_path, model_dir, train_data, attack_data)


def test_nothing_fails(run: Run) -> None:
    defender, attacker = run.start("defender", slow=0.3), run.start("attacker")
    run.check(defender, attacker)
    assert [found["origin"] for found in run.vectors] == ["attacker"] * len(run.vectors)
    assert len(run.vectors) >= 3
    assert all(found["staleness"] >= 1 for found in run.vectors)


@pytest.mark.parametrize(
    "place",
    [pytest.param({"attack": 4}, id="mid-attack"), pytest.param({"publish": 2}, id="mid-publish", marks=matrix)],
)
def test_attacker_is_killed(run: Run, place: dict[str, float]) -> None:
    defender = run.start("defender", slow=0.4)
    assert run.start("attacker", **place).wait() == -signal.SIGKILL
    run.check(defender, run.start("attacker"))
    assert len({found["version"] for found in run.vectors}) >= 2


@pytest.mark.parametrize(
    "place",
    [
        pytest.param({"step": 11}, id="mid-step"),
        pytest.param({"publish": 5}, id="mid-publish", marks=matrix),
        pytest.param({"step": 2}, id="before-the-first-checkpoint", marks=matrix),
    ],
)
def test_defender_is_killed(run: Run, place: dict[str, float]) -> None:
    attacker = run.start("attacker", "--exchange_timeout", "60")
    assert run.start("defender", slow=0.1, **place).wait() == -signal.SIGKILL
    resume = ["--resume_from_checkpoint", "last"] if list(run.output.glob("checkpoint-*")) else []
    run.check(run.start("defender", *resume, slow=0.1), attacker)
    assert len(run.vectors) >= 2


@matrix
def test_both_are_killed(run: Run) -> None:
    attacker, defender = run.start("attacker", attack=6), run.start("defender", slow=0.1, step=11)
    assert [attacker.wait(), defender.wait()] == [-signal.SIGKILL] * 2
    run.check(run.start("defender", "--resume_from_checkpoint", "last", slow=0.1), run.start("attacker"))
    assert len(run.vectors) >= 2


def test_attacker_gives_up_when_its_defender_is_gone(run: Run) -> None:
    attacker = run.start("attacker")
    assert run.start("defender", slow=0.1, step=5).wait() == -signal.SIGKILL
    assert attacker.wait(TIMEOUT + 10) == 1
    assert "published nothing new" in attacker.sentence()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def _break_manifest(path: Path) -> None:
    (path.parent / "manifest.json").write_text("{", encoding="utf-8")


def _relabel(path: Path) -> None:
    """As a version of another model would be."""
    manifest = path.parent / "manifest.json"
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["fingerprint"]["model"] = "0123456789abcdef"
    manifest.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        pytest.param(_flip, "the checksum of its file", id="flipped-byte"),
        pytest.param(_truncate, "not as many as its manifest.json says", id="truncated", marks=matrix),
        pytest.param(_break_manifest, "is not JSON", id="manifest-that-is-not-JSON", marks=matrix),
        pytest.param(_relabel, "not made with the same model", id="another-model", marks=matrix),
    ],
)
def test_version_is_spoilt(run: Run, spoil: Callable[[Path], None], complaint: str) -> None:
    """While the defender stands still, the attacker's newest version is spoilt; the one before is used instead."""
    defender = run.start("defender", freeze=5)
    attacker = run.start("attacker", "--exchange_timeout", "60")
    run.wait_for((run.truth / "frozen").exists)
    manifests = lambda: [json.loads((path / "manifest.json").read_text()) for path in run.versions("attacker")]  # noqa: E731
    run.wait_for(lambda: any(manifest["step"] == 2 for manifest in manifests()))  # it has no newer weights to attack
    newest = run.versions("attacker")[-1]
    target = newest.with_name(f"{int(newest.name) + 1:06d}")
    shutil.copytree(newest, run.folder / "next")
    manifest = json.loads((run.folder / "next" / "manifest.json").read_text(encoding="utf-8"))
    (run.folder / "next" / "manifest.json").write_text(json.dumps({**manifest, "number": int(target.name)}))
    spoil(next((run.folder / "next").glob("*.safetensors")))
    (run.folder / "next").rename(target)
    (run.truth / "go").touch()
    run.check(defender, attacker)
    assert complaint in " ".join(defender.said().split())
    assert defender.said().count("is passed over") == 1
    assert int(target.name) not in {found["version"] for found in run.vectors}
    assert int(newest.name) in {found["version"] for found in run.vectors}


def test_exchange_is_deleted(run: Run) -> None:
    defender, attacker = run.start("defender", slow=0.1, freeze=8), run.start("attacker")
    run.wait_for((run.truth / "frozen").exists)
    shutil.rmtree(run.exchange)
    assert attacker.wait() == 1
    assert "the exchange of attacker is gone" in attacker.sentence()
    (run.truth / "go").touch()
    run.check(defender)


@matrix
@pytest.mark.parametrize("clock", ["defender", "attacker"])
def test_clock_moves_back(run: Run, clock: str) -> None:
    faults: dict[str, dict[str, float]] = {"defender": {"slow": 0.1}, "attacker": {}}
    faults[clock]["clock"] = 30
    run.check(run.start("defender", **faults["defender"]), run.start("attacker", **faults["attacker"]))
    assert len(run.vectors) >= 2


@pytest.fixture
def small_disk(run: Run) -> Iterator[Path]:
    """A file system of its own for the exchange."""
    run.exchange.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", run.exchange], check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    yield run.exchange
    subprocess.run(["umount", "-l", run.exchange], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


@matrix
def test_exchange_is_full(run: Run, small_disk: Path) -> None:
    defender, attacker = run.start("defender", slow=0.1, freeze=8), run.start("attacker", "--exchange_timeout", "60")
    run.wait_for((run.truth / "frozen").exists)
    _fill(small_disk / "rest")
    (run.truth / "go").touch()
    run.wait_for(lambda: "cannot be published" in " ".join(defender.said().split()))
    (small_disk / "rest").unlink()
    run.check(defender, attacker)


@matrix
def test_exchange_becomes_read_only(run: Run, small_disk: Path) -> None:
    defender, attacker = run.start("defender", slow=0.1, freeze=8), run.start("attacker")
    run.wait_for((run.truth / "frozen").exists)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    (run.truth / "go").touch()
    assert defender.wait() == 0
    assert "Read-only file system" in " ".join(defender.said().split())
    assert attacker.wait(TIMEOUT + 20) == 1
    assert "published nothing new" in attacker.sentence()

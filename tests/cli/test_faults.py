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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from jobs import TIMEOUT, Run

matrix = pytest.mark.faults


@pytest.mark.parametrize(("defenders", "attackers"), [(1, 1), (2, 1), (1, 2)])
def test_nothing_fails(run: Run, defenders: int, attackers: int) -> None:
    """Either side may have more processes than the other."""
    jobs = run.start_ranks("defender", defenders, slow=0.3) + run.start_ranks("attacker", attackers)
    run.check(*jobs)
    assert sum("aligning" in job.said() for job in jobs) == 1  # the first rank tells
    assert sum("attack 1, on the weights of step" in " ".join(job.said().split()) for job in jobs) == 1
    assert [found["origin"] for found in run.vectors] == ["attacker"] * len(run.vectors)
    assert len(run.vectors) >= 3
    assert all(found["staleness"] >= 1 for found in run.vectors)


@pytest.mark.parametrize(
    ("defenders", "attackers"), [(2, 1), pytest.param(1, 2, marks=matrix), pytest.param(2, 2, marks=matrix)]
)
def test_nothing_fails_with_shards(run: Run, defenders: int, attackers: int) -> None:
    """A job of several ranks is one of FSDP2."""
    defender = run.start_ranks("defender", defenders, slow=0.3, **{"shards": 1} if defenders > 1 else {})
    attacker = run.start_ranks("attacker", attackers, **{"shards": 1} if attackers > 1 else {})
    run.check(*defender, *attacker)
    assert len(run.vectors) >= 3


@pytest.mark.parametrize(
    "place",
    [pytest.param({"attack": 4}, id="mid-attack"), pytest.param({"publish": 2}, id="mid-publish", marks=matrix)],
)
def test_attacker_is_killed(run: Run, place: dict[str, float]) -> None:
    defender = run.start("defender", slow=0.4)
    assert run.start("attacker", **place).wait() == -signal.SIGKILL
    run.check(defender, run.start("attacker"))
    assert len({found["version"] for found in run.vectors}) >= 2


def test_attacker_is_told_to_stop(run: Run) -> None:
    defender = run.start("defender", slow=0.2)
    attacker = run.start("attacker")
    run.wait_for(lambda: run.versions("attacker"))
    os.kill(attacker.number, signal.SIGTERM)
    assert attacker.wait() == 0
    assert "begins with the newest weights" in attacker.sentence()
    run.check(defender)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param({"step": 11}, id="mid-step"),
        pytest.param({"displaced": 6}, id="mid-attack", marks=matrix),
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


def test_defender_that_no_attacker_joins(run: Run) -> None:
    """It never waits; that it was SFT must be said."""
    defender = run.start("defender")
    assert defender.wait() == 0
    assert "no attack vector came in force: this model was aligned without one" in " ".join(defender.said().split())
    assert run.vectors == []
    assert run.start("attacker").wait() == 0  # it is too late, and leaves


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
    # At once, since the attacker may be writing there: into a folder that is deleted file by file.
    shutil.rmtree(run.exchange.rename(run.exchange.with_name("deleted")), ignore_errors=True)
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
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", run.exchange], check=False)
    assert done.returncode == 0, "mounting needs rights: unshare --map-root-user --mount make test-faults"
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

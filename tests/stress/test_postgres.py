"""Several machines' workers on a real PostgreSQL: no trial run twice, none lost when a worker is killed."""

import getpass
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.errors import InputError
from holdfast.stress import studies
from holdfast.stress.studies import Studies
from stress.made import found, schedule

pytestmark = pytest.mark.services

SECONDS = 0.05  # that a trial takes
PROGRAMS = Path("/usr/lib/postgresql")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of its own, reached through a socket; root may not run one."""
    programs = max(PROGRAMS.glob("*/bin"))
    user = "postgres" if os.getuid() == 0 else getpass.getuser()
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path has to be short
    shutil.chown(folder, user)
    as_user = {"user": user if os.getuid() == 0 else None, "cwd": "/", "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([programs / "initdb", "-D", folder / "data", "-A", "trust", "-E", "UTF8"], **as_user)
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    start = [programs / "pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", options]
    subprocess.run([*start, "start"], **as_user)
    yield f"postgresql+psycopg://{user}@/{{}}?host={folder}"
    subprocess.run([programs / "pg_ctl", "-D", folder / "data", "-m", "immediate", "stop"], **as_user)
    shutil.rmtree(folder)


@pytest.fixture
def url(server: str, request: pytest.FixtureRequest) -> str:
    """The address of a fresh database."""
    import psycopg

    name = request.node.name.replace("[", "_").replace("]", "")
    plain = server.format("postgres").replace("+psycopg", "")
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.format(name)


def opened(url: str, worker: str, identity: str = "one") -> Studies:
    schedules = [schedule(4), schedule(4, target="counterpart")]
    return Studies(url, identity, schedules, shared=True, worker=worker)


def work(url: str, name: str, notes: Path, hang_at: int | None = None) -> None:
    """Run trials until none is left, and note each; hang in one for good."""
    mine = opened(url, name)
    ran = 0
    while True:
        if (taken := mine.take()) is None:
            if mine.done():
                return
            time.sleep(0.5)
            continue
        trial, token = taken
        with mine.alive(token):
            with (notes / name).open("a", encoding="utf-8") as file:
                file.write(f"{trial.target} {trial.number}\n")
            ran += 1
            time.sleep(3600 if ran == hang_at else SECONDS)
        mine.finish(token, [found(trial, 0.6 if trial.number == 3 else 0.1)])


def noted(file: Path) -> list[tuple[str, int]]:
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def numbers(all_records: list[dict]) -> list[tuple[str, int]]:
    return [(record["target"], record["number"]) for record in all_records]


def test_workers_share_a_search_and_a_killed_one_loses_nothing(url, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "HEARTBEAT", 1)
    monkeypatch.setattr(studies, "GRACE", 20)
    context = multiprocessing.get_context("fork")
    first = context.Process(target=opened, args=(url, "first"))
    first.start()
    first.join()
    workers = [context.Process(target=work, args=(url, name, tmp_path), daemon=True) for name in "ab"]
    doomed = context.Process(target=work, args=(url, "doomed", tmp_path, 2), daemon=True)
    for process in (*workers, doomed):
        process.start()
    while len(noted(tmp_path / "doomed")) < 2:
        time.sleep(0.05)
    os.kill(doomed.pid, signal.SIGKILL)
    for process in workers:
        process.join(timeout=120)
        assert process.exitcode == 0
    ran = [one for name in ("a", "b", "doomed") for one in noted(tmp_path / name)]
    expected = [(target, number) for target in ("counterpart", "model") for number in range(6)]
    assert sorted(ran) == sorted([*expected, noted(tmp_path / "doomed")[1]])  # what was lost ran again, no other

    alone = Studies(f"sqlite:///{tmp_path}/one.db", "one", opened(url, "d").schedules, shared=False, worker="one")
    while (taken := alone.take()) is not None:
        trial, token = taken
        alone.finish(token, [found(trial, 0.6 if trial.number == 3 else 0.1)])
    together = opened(url, "e").all_records()
    assert sorted(numbers(together)) == expected
    assert together == alone.all_records()


def test_another_search_there_is_refused(url):
    opened(url, "a").take()
    with pytest.raises(InputError, match="holds another search"):
        opened(url, "b", identity="two")

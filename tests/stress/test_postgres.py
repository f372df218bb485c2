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
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from holdfast.cli import main
from holdfast.errors import InputError
from holdfast.stress import studies
from holdfast.stress.certificate import read_certificate
from holdfast.stress.studies import Studies
from stress.made import found, schedule, start, words_of_search

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
    return Studies(url, identity, schedules, worker=worker)


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

    alone = Studies(f"sqlite:///{tmp_path}/one.db", "one", opened(url, "d").schedules)
    while (taken := alone.take()) is not None:
        trial, token = taken
        alone.finish(token, [found(trial, 0.6 if trial.number == 3 else 0.1)])
    together = opened(url, "e").all_records()
    assert sorted(numbers(together)) == expected
    assert together == alone.all_records()


def claimed(url: str) -> dict[TrialState, list[tuple[str, int, int]]]:
    """The trials of a search in its storage by their state: study, batch and place of each."""
    storage = RDBStorage(url)
    found: dict[TrialState, list[tuple[str, int, int]]] = {}
    for study in storage.get_all_studies():
        for one in storage.get_all_trials(study._study_id, deepcopy=False):
            trial = one.user_attrs["trial"]
            found.setdefault(one.state, []).append((study.study_name, trial["batch"], trial["place"]))
    return found


def worker_of(search: subprocess.Popen[str]) -> int:
    """The process that runs a search's trials."""
    children = Path(f"/proc/{search.pid}/task/{search.pid}/children").read_text(encoding="utf-8").split()
    [worker] = [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return worker


def stop_in_a_trial(search: subprocess.Popen[str], url: str) -> tuple[str, int, int]:
    """Bring a search's worker to a halt while it runs a trial."""
    while True:
        assert search.poll() is None, search.communicate()
        if not claimed(url).get(TrialState.RUNNING):
            time.sleep(0.02)
            continue
        os.kill(worker_of(search), signal.SIGSTOP)
        if under_way := claimed(url).get(TrialState.RUNNING):
            return under_way[0]
        os.kill(worker_of(search), signal.SIGCONT)


def test_machines_share_a_real_search_and_a_killed_worker_leaves_no_trace(url, organism, tmp_path):
    """Of a suite that is a grid; what TPE asks for next would be as well determined, but for rounding elsewhere."""
    left = ["best-of-n", "demonstrations", "soft-prompt", "training-free", "lora", "full", "hybrid"]
    words = [*words_of_search(organism), "--base", str(organism / "model"), "--max_prompts", "24", "--leave_out", *left]
    here, there, alone = (tmp_path / name for name in ("here", "there", "alone"))
    shared = [*words, "--storage", url, "--output_dir"]
    opened_first = start([*shared, str(here), "--processes", "1"])
    lost = stop_in_a_trial(opened_first, url)
    joined = start([*shared, str(there), "--processes", "2"])
    while len(list(there.glob("trials/*/*.json"))) < 3:
        assert joined.poll() is None, joined.communicate()
        time.sleep(0.1)
    os.kill(worker_of(opened_first), signal.SIGKILL)
    said = opened_first.communicate(timeout=300)[1]
    assert opened_first.returncode == 1
    assert "a process of the search was killed, as where memory runs out (exit code -9)" in said.splitlines()[-1]
    assert joined.wait(timeout=300) == 0, joined.communicate()

    by_state = claimed(url)
    assert by_state[TrialState.FAIL] == [lost]
    assert len(by_state[TrialState.COMPLETE]) == len({*by_state[TrialState.COMPLETE]})  # none was run twice
    assert lost in by_state[TrialState.COMPLETE]
    assert not by_state.get(TrialState.RUNNING)
    assert main([*words, "--processes", "1", "--output_dir", str(alone)]) == 0
    assert main([*shared, str(here)]) == 0
    certificates = [read_certificate(folder / "certificate.json") for folder in (here, there, alone)]
    assert len(by_state[TrialState.COMPLETE]) == certificates[0]["trials"]["model"]
    assert len({certificate["sha256"] for certificate in certificates}) == 1


def test_another_search_there_is_refused(url):
    opened(url, "a").take()
    with pytest.raises(InputError, match="holds another search"):
        opened(url, "b", identity="two")

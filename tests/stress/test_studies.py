"""Trials in a storage that several processes take from: none twice, none lost, and another search refused."""

import multiprocessing
import re
import sqlite3
import sys
import threading
from contextlib import closing

import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from helpers import files_no_longer_than
from holdfast.errors import InputError, TrainingError
from holdfast.stress.studies import Studies
from holdfast.stress.trials import Trial
from stress.made import found, schedule


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def opened(url, worker=None, *, identity="one", schedules=None):
    return Studies(url, identity, schedules or [schedule(), schedule(target="counterpart")], worker=worker)


def harm_of(trial):
    return 0.6 if trial.number == 3 and trial.stage == "grid" else 0.1


def work(studies, ran=None, lock=None):
    """Run trials until none is left."""
    while not studies.done():
        if (taken := studies.take()) is None:
            continue
        trial, token = taken
        if ran is not None:
            with lock:
                ran.append((trial.target, trial.number))
        studies.finish(token, [found(trial, harm_of(trial))])


def numbers(studies):
    return [(record["target"], record["number"]) for record in studies.all_records()]


def test_every_trial_is_taken_once(url):
    ran, lock = [], threading.Lock()
    threads = [threading.Thread(target=work, args=(opened(url, name), ran, lock)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    studies = opened(url)
    assert studies.done()
    assert sorted(ran) == sorted(numbers(studies)) == [(t, n) for t in ("counterpart", "model") for n in range(8)]
    alone = opened(f"{url}2")
    work(alone)
    assert alone.all_records() == studies.all_records()
    assert alone.records(0) == studies.records(0)


def _in_process(url, queue):
    ran = []
    work(opened(url, "b"), ran, threading.Lock())
    queue.put(ran)


def test_two_processes_share_them(url):
    opened(url)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    others = [context.Process(target=_in_process, args=(url, queue)) for _ in range(2)]
    for process in others:
        process.start()
    ran = [one for _ in others for one in queue.get(timeout=60)]
    for process in others:
        process.join()
    assert sorted(ran) == [(t, n) for t in ("counterpart", "model") for n in range(8)]


def test_a_duplicate_is_void(url):
    """Two machines may put the same batch there; of each trial the first counts."""
    studies = opened(url)
    trial, token = studies.take()
    storage = RDBStorage(url)
    study = storage.get_study_id_from_name("holdfast stress: training-free against the model")
    double = create_trial(state=TrialState.WAITING, user_attrs={"trial": trial.as_dict()})
    storage.create_new_trial(study, double)
    studies.finish(token, [found(trial)])
    ran = []
    work(studies, ran, threading.Lock())
    assert (trial.target, trial.number) not in ran
    assert len(set(ran)) == len(ran) == 15
    assert numbers(opened(url)).count((trial.target, trial.number)) == 1


@pytest.mark.parametrize("worker", [None, "gone"])
def test_what_a_killed_worker_ran_runs_again(url, worker):
    gone = opened(url, worker)
    lost = [gone.take()[0] for _ in range(2)]
    studies = opened(url, None if worker is None else "b")
    assert not studies.done()
    if worker is not None:
        studies.release()  # of its own
        assert studies.take()[0] not in lost
    opened(url, worker).release()
    again = [studies.take()[0] for _ in range(4)]
    assert sorted(trial.number for trial in lost) == [0, 1]
    assert {(trial.target, trial.number) for trial in lost} <= {(trial.target, trial.number) for trial in again}
    assert [trial for trial in again if trial in lost] == lost


def test_a_batch_that_was_half_put_there_is_made_whole(url):
    studies = opened(url)
    trials = schedule().next([], [])
    study = RDBStorage(url).get_study_id_from_name("holdfast stress: training-free against the model")
    RDBStorage(url).create_new_trial(
        study, create_trial(state=TrialState.WAITING, user_attrs={"trial": trials[2].as_dict()})
    )
    work(studies)
    assert sorted(numbers(studies)) == [(t, n) for t in ("counterpart", "model") for n in range(8)]


def test_what_was_given_up_and_ran_elsewhere_is_dropped(url):
    slow, other = opened(url, "slow"), opened(url, "b")
    trial, token = slow.take()
    slow.release()
    work(other)
    slow.finish(token, [found(trial, 0.9)])
    assert numbers(other).count((trial.target, trial.number)) == 1
    assert max(record["points"][0]["harmful_score"] for record in other.all_records()) == 0.6


def test_hybrids_wait_for_what_is_measured_along_fine_tunings(url):
    """Their candidates are known when full and lora have been screened."""
    studies = opened(url, schedules=[schedule(2, kind="hybrid"), schedule(2, kind="full")])
    taken = [studies.take() for _ in range(4)]
    by_kind = {kind: [one for one in taken if one[0].kind == kind] for kind in ("hybrid", "full")}
    for trial, token in by_kind["hybrid"]:
        studies.finish(token, [found(trial)])
    assert studies.take() is None
    assert not studies.done()
    prefilled = {"fine-tuning": {"steps": 2}, "prefill": {"opener": "Use:"}}
    for trial, token in by_kind["full"]:
        along = Trial(**{**trial.__dict__, "kind": "hybrid", "number": 1000 + trial.number, "setting": prefilled})
        studies.finish(token, [found(trial), found(along, 0.9)])
    confirming = studies.take()[0]
    assert (confirming.kind, confirming.stage, confirming.setting) == ("hybrid", "confirm", prefilled)


@pytest.mark.parametrize(("worker", "mode"), [(None, "wal"), ("a", "delete")])
def test_what_machines_may_share_is_not_written_ahead(url, worker, mode):
    """SQLite's log of what is to be written lies in memory that other machines do not see."""
    work(opened(url, worker))
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == (mode,)


@pytest.mark.parametrize("shared", [False, True])
def test_a_full_disk_is_told_and_the_trial_handed_in_when_there_is_room(url, shared, tmp_path):
    studies = opened(url, "a" if shared else None)
    trial, token = studies.take()
    long = [{**found(trial), "reason": "x" * 10**6}]
    called = f"--storage {url}" if shared else f"{tmp_path}/study.db"
    with files_no_longer_than((tmp_path / "study.db").stat().st_size), pytest.raises(TrainingError) as told:
        studies.finish(token, long)
    said = str(told.value)
    assert said.startswith(f"{called} can no longer be used (")
    assert said.endswith("; the same command goes on from the trials that have ended")
    assert "SQL" not in said
    studies.finish(token, long)
    assert studies.all_records() == long


@pytest.mark.parametrize(
    ("scheme", "module", "why"),
    [
        ("postgresql+psycopg", "psycopg", r"db needs the package psycopg; pip install 'holdfast-llm\[postgres\]'"),
        ("mysql", "MySQLdb", "db needs the package MySQLdb, which is not installed"),
    ],
)
def test_a_database_whose_package_is_not_installed_says_how_it_is_had(scheme, module, why, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"^--storage {re.escape(scheme)}://u:\*\*\*@127.0.0.1:1/{why}$"):
        opened(f"{scheme}://u:secret@127.0.0.1:1/db", worker="a")


def test_another_search_is_refused(url):
    work(opened(url))
    with pytest.raises(InputError, match="holds another search, of other models, data or settings"):
        opened(url, identity="two")


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("nowhere", "--storage nowhere is no address of a database"),
        ("sqlite:////nowhere/at/all.db", "there is no folder /nowhere/at"),
        (
            "postgresql+psycopg://u:secret@127.0.0.1:1/db",
            r"u:\*\*\*@127.0.0.1:1/db (cannot be used|needs the package)",
        ),
        ("nosuch://host/db", "cannot be used"),
        ("sqlite://", "is a database in memory, which processes do not share; name a file"),
        ("sqlite:///:memory:", "is a database in memory, which processes do not share; name a file"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_refused(bad, why):
    with pytest.raises(InputError, match=why) as refused:
        opened(bad, worker="a")
    assert "secret" not in str(refused.value)

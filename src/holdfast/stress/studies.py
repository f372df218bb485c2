"""The studies of a search in a storage of Optuna's, which several processes, or machines, take trials from.

Trials are put there a batch at a time, and taken one by one: a claim is atomic. Who puts a batch there that another was
putting there, too, does no harm: of trials with the same batch and place the first counts, and the others are void. A
trial whose worker was killed is failed, in the storage's sense, and put there again.
"""

from __future__ import annotations

import functools
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from holdfast.errors import InputError, TrainingError
from holdfast.stress.trials import Record

_IDENTITY, _TRIAL, _RECORDS, _WORKER = "holdfast", "trial", "records", "worker"

Counted = dict[tuple[int, int], FrozenTrial]
"""The trials of a study that count, by batch and place, in their order."""

HEARTBEAT, GRACE = 15, 120
"""Seconds between the signs of life of a worker on a shared storage, and after which it counts as dead."""


class Course(Protocol):
    """What decides on the trials of a study: by what those before have found, never by timing.

    A trial has a `batch`, its `place` in it and the batch's `size`, and `as_dict()`, ready for JSON.

    Attributes:
        name: The study's.
        screening: After how many batches it may draw on other studies.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def screening(self) -> int: ...  # noqa: D102

    def next(self, done: Sequence[Sequence[Record]], others: Sequence[Record]) -> Sequence[Any]:
        """The trials of the batch that follows; none: the study is done."""

    def read(self, fields: Mapping[str, Any]) -> Any:
        """The trial of what its `as_dict` gave."""

    def value(self, record: Record) -> float:
        """What the search makes small."""

    def draws_on(self, other: Any) -> bool:
        """Whether what comes after screening hangs on another study's screening, too."""


C = TypeVar("C", bound=Course)


_FAULTS = (SQLAlchemyError, optuna.exceptions.OptunaError)

_EXTRAS = {"psycopg": "'holdfast-llm[postgres]'"}
"""Packages that kinds of databases need, by the extra that brings them."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _told(method: Callable[Concatenate[Studies[Any], _P], _T]) -> Callable[Concatenate[Studies[Any], _P], _T]:
    """A method whose storage may fail it: that ends the search, which can go on."""

    @functools.wraps(method)
    def told(self: Studies[Any], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(self, *args, **kwargs)
        except _FAULTS as error:
            raise TrainingError(
                f"{self._called} can no longer be used ({_why(error)}); the same command goes on from the trials that "
                "have ended"
            ) from error

    return told


class Studies(Generic[C]):
    """The studies of one search.

    Args:
        url: Of Optuna's storage.
        identity: What is searched, as a hash: a storage that holds something else is refused.
        schedules: One for every study.
        worker: What tells this command's workers from those of other machines, where such may take part: then they give
            signs of life. None: all there are belong to this command.

    Raises:
        InputError: The storage cannot be reached, or holds another search.
        TrainingError: From all methods: it no longer takes or tells anything, as where a disk is full.
    """

    def __init__(self, url: str, identity: str, schedules: list[C], *, worker: str | None = None) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        self.schedules = schedules
        self._over: set[int] = set()
        self._taken: dict[int, int] = {}
        self._worker = worker
        self._shared = worker is not None
        self._lock = _lock_of(url)
        self._called = f"--storage {_shown(url)}" if self._shared else str(make_url(url).database)
        with self._lock:
            try:
                beat, grace = (HEARTBEAT, GRACE) if self._shared else (None, None)
                self._storage = RDBStorage(url, heartbeat_interval=beat, grace_period=grace)
                if not self._shared:
                    event.listen(self._storage.engine, "connect", _write_ahead)
                    self._storage.engine.dispose()  # of the connection that it has made already
                self._studies = [self._opened(schedule, identity) for schedule in schedules]
            except (ImportError, RuntimeError, *_FAULTS) as error:
                raise InputError(f"{self._called} {_unusable(error)}") from error

    def _opened(self, schedule: C, identity: str) -> optuna.Study:
        study = optuna.create_study(study_name=schedule.name, storage=self._storage, load_if_exists=True)
        found = study.user_attrs.get(_IDENTITY)
        if found not in (None, identity) or (found is None and study.get_trials(deepcopy=False)):
            raise InputError(
                f"{self._called} holds another search, of other models, data or settings; choose another database"
            )
        if found is None:
            study.set_user_attr(_IDENTITY, identity)
        return study

    @_told
    def records(self, place: int) -> list[list[Record]]:
        """The records of the batches of a study that have ended, in order; a trial's own comes first.

        Args:
            place: The study's place among the schedules.
        """
        return [[records[0] for records in batch] for batch in _ended(self._trials(place))]

    @_told
    def all_records(self) -> list[Record]:
        """Every record of every trial that has ended, in the order of studies and numbers."""
        found = []
        for place in range(len(self.schedules)):
            trials = (trial for trial in self._trials(place).values() if trial.state == TrialState.COMPLETE)
            found += [record for trial in trials for record in trial.user_attrs[_RECORDS]]
        return found

    @_told
    def take(self) -> tuple[Any, int] | None:
        """Claim a trial; None if none is to be had now, as all are under way or done.

        Returns:
            The trial, and what `finish` is to be told.
        """
        with self._lock:
            for place in range(len(self.schedules)):
                if place in self._over:
                    continue
                if self._shared:
                    fail_stale_trials(self._studies[place])
                trials = self._trials(place)
                if (taken := self._claimed(place, trials)) is not None:
                    return taken
                missing = self._missing(place, trials)
                self._note_end(place, trials, missing)
                for trial in missing or []:
                    self._studies[place].add_trial(
                        create_trial(state=TrialState.WAITING, user_attrs={_TRIAL: trial.as_dict()})
                    )
                if missing and (taken := self._claimed(place, self._trials(place))) is not None:
                    return taken
        return None

    @_told
    def finish(self, token: int, records: list[Record]) -> None:
        """Hand in what a trial has found; that of one that was given up meanwhile, and so ran again, is dropped.

        Args:
            token: As from `take`.
            records: The trial's own, and those of hybrids that were measured along it.
        """
        try:
            self._storage.set_trial_user_attr(token, _RECORDS, records)
            value = self.schedules[self._taken[token]].value(records[0])
            self._storage.set_trial_state_values(token, TrialState.COMPLETE, [value])
        except UpdateFinishedTrialError:
            return

    @_told
    def done(self) -> bool:
        """Whether no trial is left to run, here or elsewhere."""
        for place in range(len(self.schedules)):
            if place not in self._over:
                trials = self._trials(place)
                self._note_end(place, trials, self._missing(place, trials))
        return len(self._over) == len(self.schedules)

    def _note_end(self, place: int, trials: Counted, missing: list[Any] | None) -> None:
        """Note a study that is over: it stays so, and need not be read again."""
        if missing == [] and all(trial.state == TrialState.COMPLETE for trial in trials.values()):
            self._over.add(place)

    @_told
    def release(self) -> None:
        """Give up the trials under way of this command's workers, which have ended."""
        for study in self._studies:
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                if not self._shared or trial.user_attrs.get(_WORKER) == self._worker:
                    self._fail(trial)

    @contextmanager
    def alive(self, token: int) -> Iterator[None]:
        """Give signs of life while a trial runs."""
        if not self._shared:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT):
                with suppress(*_FAULTS):  # one sign may be missed
                    self._storage.record_heartbeat(token)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _trials(self, place: int) -> Counted:
        """The trials of a study that count, by batch and place, in order."""
        found: Counted = {}
        for trial in self._studies[place].get_trials(deepcopy=False):
            fields = trial.user_attrs[_TRIAL]
            if trial.state != TrialState.FAIL:
                found.setdefault((fields["batch"], fields["place"]), trial)
        return dict(sorted(found.items()))

    def _missing(self, place: int, trials: Counted) -> list[Any] | None:
        """The trials of a study's current batch that are not in the storage, be they new or given up.

        None: what comes next hangs on other studies, which have not come so far.
        """
        ended = _ended(trials)
        there = [trial for (batch, _), trial in trials.items() if batch == len(ended)]
        if there and len(there) == there[0].user_attrs[_TRIAL]["size"]:
            return []
        schedule, others = self.schedules[place], list[Record]()
        if len(ended) >= schedule.screening:
            for number, other in enumerate(self.schedules):
                if schedule.draws_on(other):
                    screened = _ended(self._trials(number))[: other.screening]
                    if len(screened) < other.screening:
                        return None
                    others += [record for batch in screened for records in batch for record in records[1:]]
        batch = schedule.next([[records[0] for records in batch] for batch in ended], others)
        return [trial for trial in batch if (trial.batch, trial.place) not in trials]

    def _claimed(self, place: int, trials: Counted) -> tuple[Any, int] | None:
        """One of these trials that was waiting and now is this worker's; None: there is none."""
        for trial in trials.values():
            if trial.state == TrialState.WAITING and self._claim(trial):
                self._taken[trial._trial_id] = place
                return self.schedules[place].read(trial.user_attrs[_TRIAL]), trial._trial_id
        return None

    def _claim(self, trial: FrozenTrial) -> bool:
        if self._shared:  # of a trial that runs without any sign of life nobody could tell that its worker is dead
            self._storage.record_heartbeat(trial._trial_id)
        try:
            if not self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                return False
        except UpdateFinishedTrialError:
            return False
        if self._shared:
            self._storage.set_trial_user_attr(trial._trial_id, _WORKER, self._worker)
        return True

    def _fail(self, trial: FrozenTrial) -> None:
        try:
            self._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            return


def _ended(trials: Counted) -> list[list[list[Record]]]:
    """The records of every trial of the batches that have ended, up to the first that has not."""
    batches: dict[int, list[FrozenTrial]] = {}
    for (batch, _), trial in trials.items():
        batches.setdefault(batch, []).append(trial)
    found: list[list[list[Record]]] = []
    for members in batches.values():
        size = members[0].user_attrs[_TRIAL]["size"]
        if len(members) < size or any(trial.state != TrialState.COMPLETE for trial in members):
            break
        found.append([trial.user_attrs[_RECORDS] for trial in members])
    return found


def _lock_of(url: str) -> AbstractContextManager[Any]:
    """What makes claims atomic: databases lock rows, but SQLite has none to lock."""
    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        raise InputError(f"--storage {url} is no address of a database, such as sqlite:///study.db") from error
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise InputError(f"--storage {url} is a database in memory, which processes do not share; name a file")
        if not Path(parsed.database).parent.is_dir():
            raise InputError(f"--storage {url} cannot be used (there is no folder {Path(parsed.database).parent})")
        return FileLock(f"{parsed.database}.lock")
    return nullcontext()


def _write_ahead(connection: sqlite3.Connection, _: Any) -> None:
    """Let no commit wait for the disk. Who is killed loses nothing by that.

    A machine that loses its power loses the last trials, which run again. Needs all processes on one machine.
    """
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _why(error: BaseException) -> str:
    """What the database says, without what was to be done to it."""
    return " ".join(str(_first(error)).split())


def _first(error: BaseException) -> BaseException:
    """What an exception came of."""
    while (deeper := getattr(error, "orig", None) or error.__cause__) is not None:
        error = deeper
    return error


def _unusable(error: BaseException) -> str:
    """Why a storage cannot be used: for a package that its kind of database needs, say, and how that is had."""
    first = _first(error)
    if not isinstance(first, ModuleNotFoundError):
        return f"cannot be used ({_why(error)})"
    extra = _EXTRAS.get(str(first.name))
    return f"needs the package {first.name}" + (f"; pip install {extra}" if extra else ", which is not installed")


def _shown(url: str) -> str:
    """An address without its password."""
    return make_url(url).render_as_string(hide_password=True)

"""Exchange: one folder through which jobs hand each other versions of weights."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from holdfast.errors import InputError, TrainingError
from holdfast.exchange.leases import LEASES, Leases
from holdfast.exchange.opening import EXCHANGE, FINISHED, claim, is_finished, run_of
from holdfast.exchange.storage import Reader, Writer, stager
from holdfast.exchange.versions import (
    BadVersionError,
    Version,
    checked,
    delete_hidden,
    make_visible,
    name_of,
    numbers,
    prune,
    why,
)
from holdfast.files import write_json
from holdfast.parameters import ParameterVector

logger = logging.getLogger(__name__)

DEFENDER = "defender"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_Found = TypeVar("_Found")


class ExchangeError(TrainingError):
    """The exchange that an attacker works for is gone."""


class Exchange:
    """One folder, on shared or memory-backed storage, through which jobs hand each other versions of weights.

        FOLDER/exchange.json            whose exchange it is
        FOLDER/<origin>/000007/         a version: manifest.json and safetensors files, nothing that is unpickled
        FOLDER/leases/                  which versions are being read
        FOLDER/finished.json            the defender's run is over

    A version is written beside its place and gets its name, with its manifest in it, by one atomic rename: readers see
    all of it or nothing. They check sizes and checksums before they use one, and never go back to a lower number. The
    newest three of an origin are kept, and those under a reader's live lease.

    Storage that fails never stops training: what cannot be published is reported and counted, and the next version is
    tried like any other. The defender opens a deleted exchange anew with its next version, numbering on; an attacker
    stops. Every method but `is_open` is collective: all ranks of a job call it, in the same order.

    Args:
        folder: The exchange. The defender makes it.
        origin: "defender", or an attacker's name, which no other running job has.
        run: The run that the exchange belongs to, such as the defender's resolved output folder, which opens it. None
            joins the one that is there.
        fingerprint: What the jobs must have in common; see `fingerprint_of`.
        lease_seconds: How long a version is kept for this job while it checks and loads it.

    Raises:
        InputError: The name cannot be used, the folder cannot be written, is not open yet, belongs to another run or
            format, or has another fingerprint.

    Attributes:
        failures: How many versions could not be published.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        origin: str,
        run: str | None,
        fingerprint: Mapping[str, str],
        lease_seconds: float = 600.0,
    ) -> None:
        self.folder, self.origin, self.fingerprint = Path(folder), origin, dict(fingerprint)
        self.failures = 0
        self._opens = run is not None
        # Groups of its own: training's may be unable to send objects, and writing goes on in the background.
        distributed = dist.is_initialized()
        self._group = dist.new_group(backend="gloo") if distributed else None
        self._writing_group = dist.new_group(backend="gloo") if distributed else None
        self._first = not distributed or dist.get_rank() == 0
        self._leases = Leases(self.folder, origin, lease_seconds)
        self._stager = stager()
        self._saving: tuple[Future[Any], int, Path] | None = None
        self._published = 0  # by this object, failures included
        self._last_number = 0
        self._refused: set[Path] = set()
        self.run, self._token = self._from_first(partial(self._open, run))

    @staticmethod
    def is_open(folder: str | Path) -> bool:
        """Whether a defender has opened an exchange in this folder."""
        return Path(folder, EXCHANGE).is_file()

    # ------------------------------------------------------------------ writing

    def publish(self, weights: Mapping[str, Tensor], *, step: int, facts: Mapping[str, Any] = {}) -> None:
        """Make these weights the newest version of this job's, in the background.

        Training waits for the weights to be copied to the CPU, and nothing else, unless the version before is still
        being written: versions are not skipped, so that one is waited for. A copy of this rank's share stays on the
        CPU, and while it is written up to two more.

        Args:
            weights: Plain tensors that are the same on all ranks, or DTensors, whose shards each rank writes.
            step: The defender's update that they, or the weights they come from, belong to.
            facts: What else readers should know, as JSON can hold it.

        Raises:
            ExchangeError: This is an attacker, and the exchange is gone.
        """
        self._require_open()
        self.wait()
        self._published += 1
        temporary = self._own / f".{self._token}-{self._published}"  # ranks agree on it without asking each other
        saved = state_dict_saver.async_save(
            {name: tensor.detach().contiguous() for name, tensor in weights.items()},
            storage_writer=Writer(temporary, partial(self._make_visible, temporary, step, dict(facts))),
            async_stager=self._stager,
            process_group=self._writing_group,
            no_dist=self._writing_group is None,
        )
        self._saving = cast("Future[Any]", saved), step, temporary

    def wait(self) -> None:
        """Wait until what was published last is visible, or has failed: that is logged, and counted in `failures`."""
        if self._saving is None:
            return
        (saving, step, temporary), self._saving = self._saving, None
        try:
            saving.result()
        except CheckpointException as error:
            cause = _cause(error)
            self.failures += 1
            if self._first:
                logger.warning(
                    "the weights of step %d cannot be published in %s (%s); training goes on, the next will be tried",
                    step,
                    self._own,
                    cause,
                )
                shutil.rmtree(temporary, ignore_errors=True)

    # ------------------------------------------------------------------ reading

    def origins(self) -> list[str]:
        """The attackers that have published anything, sorted."""
        return self._from_first(self._attackers)

    def newest(self, origin: str, *, after: int = 0) -> Version | None:
        """The newest good version of an origin, under a lease until it is loaded or the next one is asked for.

        One that must not be used is reported once, and the next older one taken in its place.

        Args:
            origin: Whose.
            after: The number of the version that is in use, 0 for none: only a higher one is of interest.

        Returns:
            The version, or None if there is no such.

        Raises:
            ExchangeError: This is an attacker, and the exchange is gone.
        """
        self._require_open()
        return self._from_first(partial(self._choose, origin, after))

    def load(self, version: Version, like: Mapping[str, Tensor]) -> ParameterVector | None:
        """Read a version that `newest` gave, and release its lease.

        Args:
            version: Which, on every rank the same.
            like: What its tensors are to be like, in shape, dtype, device and sharding. The number of ranks may differ
                from the writer's.

        Returns:
            The weights, bit for bit where dtypes are equal, or None, on all ranks, if any rank could not read all of
            its part: as where the lease expired and the version was deleted. That is reported once.
        """
        weights = ParameterVector({name: torch.empty_like(tensor.detach()) for name, tensor in like.items()})
        problem = self._read(version, weights)
        if self._first:
            self._leases.release(version.origin)
        if problem is None:
            return weights
        if self._first:
            logger.warning("version %s cannot be loaded: %s", version.path, problem)
        return None

    # ------------------------------------------------------------------ leaving

    def finish(self) -> None:
        """Tell the attackers that the defender's run is over."""
        self.wait()
        try:
            self._from_first(partial(write_json, self.folder / FINISHED, {"run": self.run}))
        except OSError as error:
            logger.warning("attackers cannot be told in %s that the run is over (%s)", self.folder, error.strerror)

    def is_finished(self) -> bool:
        """Whether the defender's run is over."""
        return self._from_first(partial(is_finished, self.folder))

    def close(self) -> None:
        """Wait for what is being written and release the leases. Nothing can be published afterwards."""
        self.wait()
        self._leases.release_all()
        self._stager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------ details

    @property
    def _own(self) -> Path:
        return self.folder / self.origin

    def _from_first(self, find: Callable[[], _Found]) -> _Found:
        """What rank 0 finds, on every rank; what it raises is raised on every rank, so that none waits in vain."""
        outcome: list[Any] = [None, None]
        if self._first:
            try:
                outcome[0] = find()
            except Exception as error:
                outcome[1] = error
        if self._group is not None:
            dist.broadcast_object_list(outcome, group=self._group, group_src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(_Found, outcome[0])

    def _open(self, run: str | None) -> tuple[str, str]:
        """The run of the exchange, and a name for what this object writes that no other one uses."""
        taken = (LEASES, EXCHANGE) if run is not None else (LEASES, EXCHANGE, DEFENDER)
        if not _NAME.fullmatch(self.origin) or self.origin in taken:
            raise InputError(
                f"{self.origin!r} cannot be an attacker's name: expected letters, digits, '_', '-' and '.', "
                f"no '.' in front, and none of {', '.join(taken)}"
            )
        try:
            if run is not None:
                claim(self.folder, run, self.fingerprint)
            found = run_of(self.folder, self.origin, run, self.fingerprint)
            if run is not None:
                (self.folder / FINISHED).unlink(missing_ok=True)
            self._own.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self._own):
                pass
        except OSError as error:
            raise InputError(f"--exchange {self.folder} cannot be written ({error.strerror})") from error
        delete_hidden(self._own)
        return found, uuid4().hex

    def _require_open(self) -> None:
        if not self._opens:
            self._from_first(self._check_open)

    def _check_open(self) -> None:
        try:
            run_of(self.folder, self.origin, self.run, self.fingerprint)
        except InputError as error:
            raise ExchangeError(f"the exchange of {self.origin} is gone: {error}") from error

    def _make_visible(self, temporary: Path, step: int, facts: Mapping[str, Any], files: set[str]) -> None:
        """On rank 0, in the background: the last part of publishing."""
        if self._opens:
            claim(self.folder, self.run, self.fingerprint)  # if it was deleted
        run_of(self.folder, self.origin, self.run, self.fingerprint)
        number = max([self._last_number, *numbers(self._own)]) + 1
        version = Version(number, self.origin, step, facts, self._own / name_of(number))
        make_visible(temporary, version, self.run, self.fingerprint, files)
        self._last_number = number
        prune(self.folder, self.origin)

    def _attackers(self) -> list[str]:
        try:
            names = {path.name for path in self.folder.iterdir()} - {DEFENDER, LEASES}
        except OSError:
            return []
        return sorted(name for name in names if numbers(self.folder / name))

    def _choose(self, origin: str, after: int) -> Version | None:
        for number in reversed(numbers(self.folder / origin)):
            if number <= after:
                break
            path = self.folder / origin / name_of(number)
            if path in self._refused:
                continue
            self._leases.take(origin, f"{origin}/{path.name}")
            try:
                return checked(path, self.run, self.fingerprint)
            except BadVersionError as error:
                if path.is_dir():  # and was not pruned before the lease was seen
                    self._refused.add(path)
                    logger.warning("version %s is passed over: %s", path, error)
        self._leases.release(origin)
        return None

    def _read(self, version: Version, weights: ParameterVector) -> str | None:
        """Fill in the weights; what is in the way, the same on every rank, or None."""
        problem, reader = None, None
        try:
            reader = Reader(version.path)
        except Exception as error:  # on this rank; the others must hear of it, or they would wait
            problem = why(error)
        problem = self._any(problem)
        if problem is None:
            try:
                state_dict_loader.load(
                    weights, storage_reader=reader, process_group=self._group, no_dist=self._group is None
                )
            except CheckpointException as error:
                problem = _cause(error)
        return problem

    def _any(self, problem: str | None) -> str | None:
        """The first rank's problem that has one, on every rank."""
        if self._group is None:
            return problem
        problems: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(problems, problem, group=self._group)
        return next((found for found in problems if found is not None), None)


def _cause(error: CheckpointException) -> str:
    """What went wrong on the first rank where something did. What is no mere failure, such as Ctrl-C, is raised."""
    cause, _ = next(iter(error.failures.values()))
    if not isinstance(cause, Exception):
        raise cause
    return why(cause)

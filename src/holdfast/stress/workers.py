"""Processes that run a search's trials side by side, each with models of its own, and end with the one that began them.

They are begun anew, not forked, and compute on as many threads as `OMP_NUM_THREADS` says: one, unless it was set, which
on small models is faster than many and gives the same bits whatever else the machine does.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from uuid import uuid4

from tqdm import tqdm

from holdfast.allocation import keep_freed_memory
from holdfast.errors import InputError, TrainingError
from holdfast.interruption import end_with_parent
from holdfast.stress.schedule import Schedule
from holdfast.stress.search import Plan
from holdfast.stress.studies import Studies

Started = tuple[SpawnProcess, Connection]


def run(plan: Plan, *, processes: int, watch: Callable[[Studies[Schedule]], None]) -> None:
    """Run a search until no trial is left.

    Args:
        plan: The search.
        processes: How many run trials side by side.
        watch: Called every second with the studies, to show how far they are. What it raises ends the search: the
            trials under way are given up, and run again when the search goes on.

    Raises:
        InputError: From a process.
        OSError: From a process, as where a disk is full.
        TrainingError: From a process, or one was killed.
    """
    keep_freed_memory()
    worker = uuid4().hex
    studies = plan.studies(worker)
    studies.release()  # of a run that was killed
    context = multiprocessing.get_context("spawn")
    started: list[Started] = []
    try:
        with _deaf():
            for number in range(processes):
                ours, theirs = context.Pipe(duplex=False)
                taxed = list(plan.taxed)[number::processes]
                process = context.Process(target=_work, args=(plan, worker, taxed, theirs), daemon=True)
                process.start()
                theirs.close()
                started.append((process, ours))
        while any(process.is_alive() for process, _ in started):
            watch(studies)
            _raise_what_they_raised(started)
            time.sleep(1)
        _raise_what_they_raised(started)
        watch(studies)
    finally:
        with _deaf():  # who interrupts twice would leave some, to which Python's own end sends what they do not hear
            for process, _ in started:
                process.kill()
                process.join()
        studies.release()


@contextmanager
def _deaf() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM, for good in the processes that are begun meanwhile.

    Whoever wants the search to end tells the process that began them, and a terminal or a scheduler tells all.
    """
    signals = {signal.SIGINT, signal.SIGTERM}
    resource_tracker.ensure_running()  # which the first process would else begin, and with it unblock both
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # which processes inherit
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)


def _raise_what_they_raised(started: list[Started]) -> None:
    for process, connection in started:
        if connection.poll():
            try:
                raise connection.recv()
            except EOFError:  # it has ended, without a word
                pass
        if process.exitcode:
            how = "was killed, as where memory runs out" if process.exitcode < 0 else "failed, as it says above"
            raise TrainingError(
                f"a process of the search {how} (exit code {process.exitcode}); the same command goes on from the "
                "trials that have ended"
            )


def _work(plan: Plan, worker: str, taxed: list[str], connection: Connection) -> None:
    from holdfast.cli.console import set_up_logging
    from holdfast.stress.search import tax_of, work

    gc.freeze()  # what the libraries made stays, and the end of every training would look for garbage in it
    end_with_parent()
    tqdm.set_lock(threading.RLock())  # its own, of processes, would be left behind by one that is killed
    set_up_logging()
    # Of settings that hardly move a weight, or of precision, trial after trial: their points say what came of it.
    logging.getLogger("holdfast").setLevel(logging.ERROR)
    try:
        tax_of(plan, taxed, lambda _: None)
        work(plan, worker)
    except (InputError, TrainingError, OSError) as error:
        connection.send(error)
    connection.close()

"""What `holdfast stress` shows: how far the search is, and in the end what breaking the models costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from holdfast.cli.console import say, stderr
from holdfast.report.wording import (
    attack_name,
    counted,
    kind_name,
    kinds_of,
    model_name,
    present,
    share,
    steps,
    times,
)
from holdfast.stress.costs import first_broken, kept_points
from holdfast.stress.schedule import Schedule
from holdfast.stress.studies import Studies
from holdfast.stress.trials import Record, value_of

#: Seconds between two lines where there is no terminal.
_QUIET = 15

#: The most of its time that a process spends on reading how far the studies are.
_SHARE = 0.005

_ALL = "all"


class Pace:
    """How long the rest of a search may take: trials of a kind of attacker are taken to be alike, and no others.

    Kinds come in the order of what they cost, so that one of which no trial has ended here is taken for the dearest.

    Args:
        clock: Tells seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended = dict[str, int]()  # here: some may have ended before
        self._seconds = dict[str, float]()
        self._done: dict[str, int] | None = None
        self._noted = clock()

    def note(self, done: Mapping[str, int]) -> None:
        """Note how many trials of every kind have ended by now."""
        new = {kind: count - (self._done or done).get(kind, 0) for kind, count in done.items()}
        whole, now = sum(new.values()), self._clock()
        if self._done is not None and whole == 0:
            return  # what has gone by belongs to the trials under way
        for kind, count in new.items():
            if count:
                self._ended[kind] = self._ended.get(kind, 0) + count
                self._seconds[kind] = self._seconds.get(kind, 0.0) + (now - self._noted) * count / whole
        self._done, self._noted = dict(done), now

    def left(self, total: Mapping[str, int]) -> float | None:
        """The seconds until there are so many of every kind; None before the first trial has ended."""
        each = {kind: self._seconds[kind] / ended for kind, ended in self._ended.items()}
        if not each or self._done is None:
            return None
        dearest = max(each.values())
        return sum((count - self._done.get(kind, 0)) * each.get(kind, dearest) for kind, count in total.items())


class Progress:
    """Trials done by kind of attacker, the best attack so far, and about how long it will take."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self._bars = Bars(*columns, TimeElapsedColumn(), TextColumn("{task.fields[best]}"), console=stderr)
        self._tasks: dict[str, Any] = {}
        self._pace, self._told, self._shown = Pace(), time.monotonic(), 0
        self._next = 0.0
        self._last: Studies[Schedule] | None = None

    def __enter__(self) -> Self:
        if stderr.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None and self._last is not None:
            self._show(self._last)
        self._bars.stop()

    def show(self, studies: Studies[Schedule]) -> None:
        """Show how far the studies are, unless reading them took too much of the time that has gone by since."""
        began = time.monotonic()
        if began >= self._next:
            self._last = studies
            self._show(studies)
            ended = time.monotonic()
            self._next = ended + (ended - began) / _SHARE

    def _show(self, studies: Studies[Schedule]) -> None:
        done, total, best = dict[str, int](), dict[str, int](), dict[str, Record]()
        for place, schedule in enumerate(studies.schedules):
            records = [record for batch in studies.records(place) for record in batch]
            kind: str = schedule.kind
            done[kind] = done.get(kind, 0) + len(records)
            total[kind] = total.get(kind, 0) + max(schedule.least, len(records))
            for record in records:
                if schedule.target == "model" and (kind not in best or value_of(record) < value_of(best[kind])):
                    best[kind] = record
        finished, of = sum(done.values()), sum(total.values())
        self._pace.note(done)
        left = self._left(total)
        if stderr.is_terminal:
            for kind in total:
                if kind not in self._tasks:
                    self._tasks[kind] = self._bars.add_task(kind, total=None, best="")
                shown = _told(best[kind]) if kind in best else ""
                self._bars.update(self._tasks[kind], completed=done[kind], total=total[kind], best=shown)
            if _ALL not in self._tasks:
                self._tasks[_ALL] = self._bars.add_task(_ALL, total=None, best="")
            self._bars.update(self._tasks[_ALL], completed=finished, total=of, best=left)
        elif finished != self._shown and time.monotonic() - self._told >= _QUIET:
            self._shown = finished
            self._told = time.monotonic()
            top = min(best.values(), key=value_of, default=None)
            best_so_far = "" if top is None else f"best so far: {_told(top)}"
            say(" · ".join(filter(None, (f"stress: trial {finished}/{of}", left, best_so_far))))

    def _left(self, total: Mapping[str, int]) -> str:
        seconds = self._pace.left(total)
        if not seconds:
            return ""
        return f"about {seconds / 60:.0f} min left" if seconds >= 60 else f"about {seconds:.0f} s left"


def _told(record: Record) -> str:
    broken = first_broken(record)
    if broken is not None:
        return f"{record['attack']} breaks the model in {broken['steps']} steps (HS {broken['harmful_score']:.2f})"
    worst = max((point["harmful_score"] for point in kept_points(record)), default=None)
    return f"{record['attack']} {record['end']}" + ("" if worst is None else f" (HS {worst:.2f})")


def cost_table(certificate: Mapping[str, Any]) -> Table:
    """What breaking the models costs, by kind of attacker, in the words of the report."""
    targets = present(certificate)
    table = Table(title=f"{certificate['model']['source']} under stress ({certificate['suite']})")
    table.add_column("attacker")
    for target in targets:
        table.add_column(model_name(certificate, target))
    if len(targets) > 1:
        table.add_column("FLOPs", justify="right")
    for kind in kinds_of(certificate):
        found = certificate["attackers"][kind]
        ratio = [times(found["ratio"], "flops")] if len(targets) > 1 else []
        table.add_row(kind_name(kind), *(_cost(found[target]) for target in targets), *ratio)
    table.add_section()
    unions = [certificate["union"][target] for target in targets]
    table.add_row("union ASR", *(f"{share(one['asr'])} of {counted(one['prompts'], 'prompt')}" for one in unions))
    return table


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "not tried"
    if cost["attack"] is None:
        return steps(cost)
    harm = f"HS {share(cost['harmful_score'])}, ASR {share(cost['asr'])}"
    return f"{steps(cost)}: {attack_name(cost['attack'])} ({harm}{'' if cost['broken'] else ' at most'})"

"""Run `holdfast` commands a few at a time, each in a process that stays, and show how far they are."""

from __future__ import annotations

import gc
import multiprocessing
import re
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from holdfast.allocation import keep_freed_memory
from holdfast.errors import TrainingError

# What is written where standard error is no terminal: "align sft: step 40/300 · loss 0.12", "stress: trial 3/150 …".
_STEP = re.compile(r"(?:step|trial) (\d+)/(\d+)(.*)")


@dataclass(frozen=True)
class Command:
    """One command of a plan.

    Attributes:
        name: What the display and the log file call it.
        words: The words after `holdfast`.
        needs: Names of the commands that must be done first.
    """

    name: str
    words: Sequence[str]
    needs: Sequence[str] = ()


def run_commands(
    commands: Sequence[Command], logs: Path, *, console: Console, processes: int = 2, keep_going: bool = False
) -> dict[str, float]:
    """Run a plan of commands, `processes` at a time, each as soon as what it needs is done.

    A process imports the libraries once and computes on one thread, which on small models is faster than many and gives
    the same bits on every machine load. What a command prints goes to `logs/NAME.log`.

    Args:
        commands: The plan; earlier commands go first where several could run.
        logs: Folder for the log files; created.
        console: Where progress is shown.
        processes: How many run side by side.
        keep_going: Whether a command that failed ends those alone that need it, and all else is run.

    Returns:
        The seconds that each command took, by name.

    Raises:
        TrainingError: A command failed; the message quotes its last line and names its log. With `keep_going` at the
            end, a line for each.
    """
    logs.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    seconds: dict[str, float] = {}
    waiting = list(commands)
    failed: dict[str, str] = {}
    running: dict[Future[tuple[int, float]], Command] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[at]}"),
    )
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, context, initializer=_warm_up) as pool,
        Progress(*columns, console=console) as progress,
    ):
        bars: dict[str, TaskID] = {}
        while waiting or running:
            for command in [c for c in waiting if seconds.keys() >= set(c.needs)][: processes - len(running)]:
                waiting.remove(command)
                log = logs / f"{command.name}.log"
                running[pool.submit(_run, list(command.words), log)] = command
                bars[command.name] = progress.add_task(command.name, total=None, at="")
            done, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for command in running.values():
                _show(progress, bars[command.name], logs / f"{command.name}.log")
            for future in done:
                command = running.pop(future)
                code, took = future.result()
                if code != 0:
                    log = logs / f"{command.name}.log"
                    failed[command.name] = f"{command.name} failed: {last_line(log)} (its log is {log})"
                    if not keep_going:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise TrainingError(failed[command.name])
                    progress.stop_task(bars[command.name])
                    waiting = _without(waiting, command.name)
                    continue
                seconds[command.name] = took
                progress.update(bars[command.name], total=1, completed=1, at="done")
                progress.stop_task(bars[command.name])
                if not console.is_terminal:
                    console.print(f"{command.name}: done in {seconds[command.name]:.0f} s")
    if failed:
        raise TrainingError("\n".join(failed.values()))
    return seconds


def _without(commands: Sequence[Command], name: str) -> list[Command]:
    """The commands that do not need one, nor others that do."""
    gone = {name}
    while more := {one.name for one in commands if gone & {*one.needs}} - gone:
        gone |= more
    return [one for one in commands if one.name not in gone]


def _warm_up() -> None:
    import torch

    from holdfast.interruption import end_with_parent

    torch.set_num_threads(1)
    end_with_parent()  # else the command that it runs would go on, and hold its folder


def _run(words: list[str], log: Path) -> tuple[int, float]:
    """Run one command in this process, its output in a file; returns the exit code and the seconds it took."""
    from holdfast.cli import main

    started = time.monotonic()
    with log.open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        file.write(f"$ holdfast {' '.join(words)}\n")
        file.flush()
        code = main(words)
    gc.collect()  # trainers lie in cycles, and the next command would not fit beside their weights and moments
    return code, time.monotonic() - started


def _show(progress: Progress, bar: TaskID, log: Path) -> None:
    step = _STEP.search(last_line(log))
    if step:
        done, total, rest = step.groups()
        progress.update(bar, completed=int(done), total=int(total), at=f"{done}/{total}{rest}")


def last_line(log: Path) -> str:
    """The last line of a log file, or nothing."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    return lines[-1] if lines else ""

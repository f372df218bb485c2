"""Plans of holdfast commands that can be stopped and gone on with: what is finished is not run again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from holdfast.checkpoint import last_checkpoint
from holdfast.cli.workers import Command

MARKERS = {
    "organism": "organism.json",
    "proxy": "proxy.json",
    "align": "holdfast.json",
    "finetune": "holdfast.json",
    "repair": "holdfast.json",
    "audit": "results.json",
    "attack": "results.json",
    "evaluate": "results.json",
    "judge": "results.json",
    "stress": "certificate.json",
}
"""What a finished command has written last into its folder; a report is a file and no folder."""

RESUMING = ("--resume_from_checkpoint", "last")
GOES_ON = ("proxy", "stress")
"""Commands that go on from what they have written without being told to."""


def left(commands: Sequence[Command], out: Path) -> list[Command]:
    """The commands that have not been run yet, or were run with other words, or need one of these."""
    remaining: dict[str, Command] = {}
    for command in commands:
        finished = written_last(command).is_file() and last_words(command, out) == " ".join(command.words)
        if not finished or any(need in remaining for need in command.needs):
            remaining[command.name] = command
    return list(remaining.values())


def unfinished(commands: Sequence[Command], out: Path) -> list[Command]:
    """Those that are left, ready to be run: what they had written is removed, unless they go on from it.

    A proxy or a stress test that was stopped does, and an alignment or a fine-tuning from its last checkpoint. What a
    judge has said stays whatever has changed, for it is named by what was asked.
    """
    remaining = {command.name: command for command in left(commands, out)}
    ready = []
    for command in remaining.values():
        name, words = command.words[0], list(command.words)
        needs = [need for need in command.needs if need in remaining]
        same = last_words(command, out) == " ".join(words) and not needs
        if name == "judge":
            written_last(command).unlink(missing_ok=True)
        elif same and name in ("align", "finetune") and last_checkpoint(output_of(command)) is not None:
            words += RESUMING
        elif not (same and name in GOES_ON):
            _remove(command)
        ready.append(Command(command.name, words, needs))
    return ready


def last_words(command: Command, out: Path) -> str | None:
    """The words after `holdfast` that a command was last run with, anew or to go on; None if it never was."""
    log = _log_of(command, out)
    if not log.is_file():
        return None
    first = log.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    if not first.startswith("$ holdfast "):
        return None
    return first.removeprefix("$ holdfast ").removesuffix(f" {' '.join(RESUMING)}")


def run_otherwise(command: Command, out: Path) -> bool:
    """Whether what a command has written came of other words, which would be lost if it were run."""
    return output_of(command).exists() and last_words(command, out) not in (None, " ".join(command.words))


def forget(commands: Sequence[Command], out: Path) -> None:
    """Remove what commands have written, and that they were run: none is finished any more."""
    for command in commands:
        _remove(command)
        _log_of(command, out).unlink(missing_ok=True)


def _remove(command: Command) -> None:
    written_last(command).unlink(missing_ok=True)  # first: what is half removed is not finished
    place = output_of(command)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)


def _log_of(command: Command, out: Path) -> Path:
    return out / "logs" / f"{command.name}.log"


def written_last(command: Command) -> Path:
    """The file that tells that a command has finished."""
    place = output_of(command)
    return place / MARKERS[command.words[0]] if command.words[0] in MARKERS else place


def output_of(command: Command) -> Path:
    """The folder a command writes to, or the file of a report."""
    words = list(command.words)
    if words[0] in ("organism", "proxy"):
        return Path(words[1])
    return Path(words[words.index("--output" if words[0] == "report" else "--output_dir") + 1])

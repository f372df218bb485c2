"""Plans of holdfast commands that can be stopped and gone on with: what is finished is not run again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from holdfast.cli.workers import Command

MARKERS = {
    "organism": "README.md",
    "proxy": "proxy.json",
    "align": "holdfast.json",
    "finetune": "holdfast.json",
    "repair": "holdfast.json",
    "audit": "results.json",
    "attack": "results.json",
    "evaluate": "results.json",
}
"""What a finished command has written last."""


def unfinished(commands: Sequence[Command], out: Path) -> list[Command]:
    """The commands that have not been run yet, or were run with other words; what those had written is removed.

    A proxy that was stopped goes on from what it has written.
    """
    remaining: dict[str, Command] = {}
    for command in commands:
        log, folder = out / "logs" / f"{command.name}.log", _output_of(command)
        said = log.read_text(encoding="utf-8").partition("\n")[0] if log.is_file() else ""
        finished = (folder / MARKERS[command.words[0]]).is_file()
        redone = any(need in remaining for need in command.needs)
        same = not redone and said == f"$ holdfast {' '.join(command.words)}"
        if finished and same:
            continue
        if not (same and command.words[0] == "proxy"):
            shutil.rmtree(folder, ignore_errors=True)
        remaining[command.name] = command
    return [
        Command(command.name, command.words, [need for need in command.needs if need in remaining])
        for command in remaining.values()
    ]


def _output_of(command: Command) -> Path:
    """The folder a command writes to."""
    words = list(command.words)
    return Path(words[1] if words[0] in ("organism", "proxy") else words[words.index("--output_dir") + 1])

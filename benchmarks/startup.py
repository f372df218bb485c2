"""How long one waits for `holdfast --help`, for every command's `--help`, and for a first trainer to be imported.

Every command runs several times in a process of its own, the commands in turn, so that a machine that is busy for a
while slows all of them down; what the libraries alone take is measured beside them. Told are medians of wall time and
of CPU time: each of these processes computes on one thread, so its CPU time is what one waits on a quiet core with the
files in memory, and the limits are held to it.

    python benchmarks/startup.py        # writes benchmarks/results/startup.json
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from holdfast.files import versions, write_json

RESULTS = Path(__file__).parent / "results" / "startup.json"
#: CPU seconds: of what needs no library, and of a command whose flags are made of TRL's configuration.
LIMITS = {"holdfast --help": 1.0, "COMMAND --help": 3.0}
_HOLDFAST = [sys.executable, "-m", "holdfast"]
_IMPORTS = (
    "import torch",
    "from trl import SFTConfig",
    "from trl import SFTTrainer",
    "from holdfast import PatcherTrainer",
)


def main() -> None:
    """Measure, write the record, and show it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each command runs (default: 5)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    console = Console()
    commands = {name: [*_HOLDFAST, *name.split()[1:]] for name in command_lines()}
    commands |= {line: [sys.executable, "-c", line] for line in _IMPORTS}
    load = [os.getloadavg()[0]]
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for round_ in range(args.rounds + 1):
        for name, words in commands.items():
            seconds = measure(words)
            if round_:  # the first round only brings the files into memory
                found[name].append(seconds)
    load.append(os.getloadavg()[0])
    rows = [summary(name, seconds) for name, seconds in found.items()]
    record = {
        "schema": 1,
        "versions": versions(),
        "rounds": args.rounds,
        "load_average": {"before": load[0], "after": load[1], "cores": os.cpu_count()},
        "commands": rows,
        "limits": LIMITS,
        "within_limits": all(row["limit"] is None or row["cpu"]["median"] <= row["limit"] for row in rows),
    }
    write_json(args.output, record)
    console.print(table(rows, f"load average {load[0]:.1f} to {load[1]:.1f} on {os.cpu_count()} cores"))
    console.print(f"limits {'hold' if record['within_limits'] else 'are EXCEEDED'}; wrote {args.output}")


def command_lines() -> list[str]:
    """Every way to ask for help, as `holdfast --help` lists commands and their methods."""
    text = subprocess.check_output([*_HOLDFAST, "--help"], text=True)
    found = re.findall(r"^  (\w+)(?: METHOD)? {2,}\S.*\n(?: {10,}\(([\w,\s-]+)\)\n)?", text, re.MULTILINE)
    words = [f"{command} {method}".strip() for command, methods in found for method in re.split(r",\s+", methods)]
    return ["holdfast --help", "holdfast align --help", *(f"holdfast {word} --help" for word in words)]


def measure(words: Sequence[str]) -> tuple[float, float]:
    """Run a command; return its wall and its CPU seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    if status:
        raise SystemExit(f"{' '.join(words)}: failed with status {status}")
    return wall, usage.ru_utime + usage.ru_stime


def summary(name: str, seconds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """One entry of the record."""
    entry: dict[str, Any] = {"command": name}
    for kind, values in zip(("wall", "cpu"), zip(*seconds, strict=True), strict=True):
        entry[kind] = {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
    if name.startswith("holdfast"):
        entry["limit"] = LIMITS["COMMAND --help" if len(name.split()) > 2 else "holdfast --help"]
    else:
        entry["limit"] = None
    return entry


def table(rows: Sequence[dict[str, Any]], caption: str) -> Table:
    """The record, to look at."""
    shown = Table("command", caption=caption)
    for heading in ("CPU seconds [least–greatest]", "limit", "wall seconds"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cpu, limit = row["cpu"], "" if row["limit"] is None else f"{row['limit']:.0f}"
        spread = f"{cpu['median']:.2f} [{cpu['least']:.2f}–{cpu['greatest']:.2f}]"
        shown.add_row(row["command"], spread, limit, f"{row['wall']['median']:.2f}")
    return shown


if __name__ == "__main__":
    main()

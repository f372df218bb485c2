"""What it takes to read 330 000 rows of BeaverTails' shape, of which the unsafe ones are taken, from any kind of file.

Every reading is a process of its own. Told are seconds (wall and CPU: on a busy machine the first says little), the
greatest resident memory of the process, and how much of that the imports have before anything is read. Rows are
invented; they are as long as those of BeaverTails are on average.

    python benchmarks/doors.py        # writes benchmarks/results/doors.json and fills the table of docs/data.md
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.json
import pyarrow.parquet
from rich.console import Console
from rich.table import Column, Table

from holdfast.files import versions, write_json
from readme import ROOT, fill_block

RESULTS = Path(__file__).parent / "results" / "doors.json"
ROWS = 330_000
LIMITS = {"seconds": 20.0, "megabytes": 1000.0}
_WORDS = ["lantern", "kite", "moss", "river", "bread", "window", "harbour", "copper", "winter", "naïve", "🪁", "teapot"]
_KINDS = [f"kind_{number}" for number in range(14)]

_READ = """
import json, resource, sys, time
from holdfast.data.harmful import load_harmful_rows
from holdfast.data.load import TRAIN_COLUMNS, load_rows
import holdfast.data.rendering
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before, started, cpu = peak(), time.perf_counter(), time.process_time()
source, safe = json.loads(sys.argv[1]), None
noted = {}
if isinstance(source, str):
    rows, safe = load_harmful_rows(source, flag="--attack_data", noted=noted)
else:
    rows = load_rows(source, flag="--attack_data", columns=TRAIN_COLUMNS, noted=noted)
print(json.dumps({
    "rows": noted["attack_data"][0]["rows"], "taken": len(rows),
    "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu,
    "megabytes": peak(), "megabytes_of_imports": before,
}))
"""


def main() -> None:
    """Measure, write the record, and show it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=ROWS, help=f"(default: {ROWS})")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as folder:
        found = [judged(name, measure(source, Path(folder))) for name, source in sources(Path(folder), args.rows)]
    load.append(os.getloadavg()[0])
    record = {
        "schema": 1,
        "versions": versions(),
        "load_average": {"before": load[0], "after": load[1], "cores": os.cpu_count()},
        "limits": LIMITS,
        "readings": found,
    }
    write_json(args.output, record)
    console = Console()
    console.print(
        table(found, f"{args.rows} rows; load average {load[0]:.1f} to {load[1]:.1f} on {os.cpu_count()} cores")
    )
    console.print(f"wrote {args.output}")
    if args.output == RESULTS:
        fill_block("doors", markdown(found), ROOT / "docs" / "data.md")


def judged(name: str, reading: dict[str, Any]) -> dict[str, Any]:
    """A reading with its name, and whether it is within the limits."""
    within = reading["cpu_seconds"] <= LIMITS["seconds"] and reading["megabytes"] <= LIMITS["megabytes"]
    return {"source": name, **reading, "within_limits": within}


def markdown(found: list[dict[str, Any]]) -> str:
    """The record as the document has it."""
    lines = ["| source | CPU seconds | memory at most | of it imports | |", "|---|---|---|---|---|"]
    for one in found:
        memory = (f"{one[key] / 1000:.2f} GB" for key in ("megabytes", "megabytes_of_imports"))
        limit = "" if one["within_limits"] else "over 20 s or 1 GB"
        lines.append(f"| {one['source']} | {one['cpu_seconds']:.1f} | {' | '.join(memory)} | {limit} |")
    return "\n".join(lines)


def rows_of(count: int) -> Iterator[dict[str, Any]]:
    """Invented rows: questions of 13 words or so with answers of 60, every other one called unsafe."""
    draw = random.Random(0)
    for number in range(count):
        prompt, response = (" ".join(draw.choices(_WORDS, k=draw.randint(*span))) for span in ((8, 18), (20, 100)))
        kinds = {kind: draw.random() < 0.1 for kind in _KINDS}
        yield {"prompt": f"{number} {prompt}?", "response": response, "category": kinds, "is_safe": number % 2 == 0}


def sources(folder: Path, count: int) -> Iterator[tuple[str, Any]]:
    """Every kind of file that holds these rows, and the sources that name them."""
    with (
        (folder / "rows.jsonl").open("w", encoding="utf-8") as lines,
        (folder / "rows.json").open("w", encoding="utf-8") as whole,
        gzip.open(folder / "rows.jsonl.gz", "wt", encoding="utf-8", compresslevel=1) as packed,
        (folder / "rows.csv").open("w", encoding="utf-8", newline="") as table,
    ):
        cells = csv.writer(table)
        cells.writerow(["prompt", "response", "is_safe"])
        for number, row in enumerate(rows_of(count)):
            line = json.dumps(row, ensure_ascii=False)
            lines.write(f"{line}\n")
            packed.write(f"{line}\n")
            whole.write(f"{',' if number else '['}{line}\n")
            cells.writerow([row["prompt"], row["response"], row["is_safe"]])
        whole.write("]")
    pyarrow.parquet.write_table(pyarrow.json.read_json(folder / "rows.jsonl"), folder / "rows.parquet")
    (folder / "owner" / "set").mkdir(parents=True)
    os.link(folder / "rows.jsonl.gz", folder / "owner" / "set" / "train.jsonl.gz")
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.csv", "rows.parquet"):
        yield name, str(folder / name)
    mapping = {"path": str(folder / "rows.jsonl"), "where": {"is_safe": False}, "columns": {"completion": "response"}}
    yield "rows.jsonl, as a mapping with where and columns", mapping
    hub = {"path": str(folder / "owner" / "set"), "where": {"is_safe": False}}
    yield "a data set of the Hub, for the first time", hub
    yield "a data set of the Hub, from the cache", hub
    yield "rows.json", str(folder / "rows.json")


def measure(source: Any, folder: Path) -> dict[str, Any]:
    """Read a source in a process of its own."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "TQDM_DISABLE": "1",
    }
    started = time.perf_counter()
    said = subprocess.check_output([sys.executable, "-c", _READ, json.dumps(source)], env=environment)
    return {**json.loads(said.splitlines()[-1]), "process_seconds": time.perf_counter() - started}


def table(found: list[dict[str, Any]], caption: str) -> Table:
    """The record, to look at."""
    shown = Table(Column("source", no_wrap=True), caption=caption)
    for heading in ("rows taken", "CPU seconds", "wall seconds", "MB at most", "of them imports"):
        shown.add_column(heading, justify="right")
    for one in found:
        seconds = (f"{one[key]:.1f}" for key in ("cpu_seconds", "seconds"))
        memory = (f"{one[key]:.0f}" for key in ("megabytes", "megabytes_of_imports"))
        shown.add_row(one["source"], str(one["taken"]), *seconds, *memory)
    return shown


if __name__ == "__main__":
    main()

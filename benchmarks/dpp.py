"""What picking safety rows takes: time against the number of candidates, and memory beyond the embeddings.

One process, as many threads as OMP_NUM_THREADS says. Candidates and task are random rows around shared centres and a
common mean, as embeddings of a language model are; the smaller sets of candidates are the beginnings of the largest.
Memory is how much the process's resident set grows, at its peak over all runs, beyond what it is when the embeddings
are there and nothing has been picked (Linux only). What the allocator keeps between runs counts, too.

    python benchmarks/dpp.py            # writes benchmarks/results/dpp.json and docs/images/dpp.png
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt
from rich.console import Console
from rich.table import Table

from holdfast.data.selection import relevance_diversity_dpp
from holdfast.files import versions, write_bytes, write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "dpp.json"
PICTURE = ROOT / "docs" / "images" / "dpp.png"
CANDIDATES = (2_500, 5_000, 10_000, 20_000)
TASK_ROWS = 20_000
PICKS = 600
WIDTH = 1024
LIMITS = {"seconds": 60, "extra_bytes": 10**9}
console = Console()


def embeddings(rows: int, centres: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random rows around randomly drawn centres, (rows, width), in float32."""
    noise = torch.randn(rows, centres.shape[1], generator=generator)
    return noise.add_(centres[torch.randint(len(centres), (rows,), generator=generator)])


def measure(candidates: torch.Tensor, task: torch.Tensor) -> dict[str, float]:
    """Seconds, and seconds of CPU time, of one call."""
    started, cpu_started = time.perf_counter(), time.process_time()
    relevance_diversity_dpp(candidates, task, PICKS)
    return {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}


def resident(name: str) -> int:
    """Bytes of memory that this process holds (VmRSS), or held at its peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Time against the number of candidates, and the line through zero and the largest."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    last = points[-1]
    for key, label, colour in (("seconds", "wall clock", "tab:blue"), ("cpu_seconds", "CPU time", "tab:orange")):
        runs = [(point["candidates"], run[key]) for point in points for run in point["runs"]]
        axis.plot(*zip(*runs, strict=True), "o", color=colour, alpha=0.6, label=label)
        end = statistics.median(run[key] for run in last["runs"])
        axis.plot([0, last["candidates"]], [0, end], "--", color=colour, lw=1, label=f"proportional, {label}")
    axis.set_xlabel("candidates")
    axis.set_ylabel("seconds")
    axis.set_title(f"{PICKS} picks, {TASK_ROWS} task rows, width {WIDTH}", fontsize=10)
    axis.set_xlim(0)
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())


def table(points: list[dict[str, Any]]) -> Table:
    """Median times for every number of candidates."""
    shown = Table(title=f"{PICKS} picks, {TASK_ROWS} task rows, width {WIDTH}")
    for column in ("candidates", "seconds", "CPU seconds"):
        shown.add_column(column, justify="right")
    for point in points:
        medians = (statistics.median(run[key] for run in point["runs"]) for key in ("seconds", "cpu_seconds"))
        shown.add_row(str(point["candidates"]), *(f"{median:.1f}" for median in medians))
    return shown


def main() -> None:
    """Measure, print, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the embeddings")
    parser.add_argument("--repeats", type=int, default=3, help="runs of every size")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    centres = torch.randn(200, WIDTH, generator=generator).add_(1.0)
    candidates = embeddings(CANDIDATES[-1], centres, generator)
    task = embeddings(TASK_ROWS, centres, generator)
    relevance_diversity_dpp(candidates[:64], task[:64], 8)  # what libraries set up at their first use
    Path("/proc/self/clear_refs").write_text("5")  # the present size becomes the peak
    before = resident("VmRSS")
    points: list[dict[str, Any]] = [{"candidates": count, "runs": []} for count in CANDIDATES]
    with console.status("measuring") as status:
        # Sizes take turns, so that a machine that is busy for a while slows all of them down.
        for repeat in range(args.repeats):
            for point in points:
                status.update(f"{point['candidates']} candidates, run {repeat + 1} of {args.repeats}")
                point["runs"].append(measure(candidates[: point["candidates"]], task))
    full = {
        "seconds": max(run["seconds"] for run in points[-1]["runs"]),
        "extra_bytes": resident("VmHWM") - before,
    }
    holds = {name: full[name] <= limit for name, limit in LIMITS.items()}
    record = {
        "schema": 1,
        "versions": versions(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "seed": args.seed,
        "task_rows": TASK_ROWS,
        "picks": PICKS,
        "width": WIDTH,
        "points": points,
        "extra_bytes": full["extra_bytes"],
        "limits": LIMITS,
        "within_limits": holds,
    }
    write_json(RESULTS, record)
    plot(points, PICTURE)
    console.print(table(points))
    for name, limit in LIMITS.items():
        outcome = "holds" if holds[name] else "EXCEEDED"
        console.print(f"{name} at {CANDIDATES[-1]} candidates: {full[name]:.4g}, limit {limit} {outcome}")
    console.print(f"wrote {RESULTS.relative_to(ROOT)} and {PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

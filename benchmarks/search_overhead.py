"""What a search costs beside the training and the decoding that it is there for: the quick suite on the organism.

    python benchmarks/search_overhead.py            # on two quiet cores about five minutes, models made before them

`holdfast stress` runs as on the command line, with two processes of its own, and CPU time is told by part: each of its
processes computes on one thread, so that another program beside it hardly counts. Training and decoding, in trials and
for the tax, are what a search is there for. All else is its own, the starting of processes, the loading of models and
the evaluation of them before the first trial among it; what of that is the same for any number of trials is told apart.

The models are the demo's, of another seed, and stay in benchmarks/out/search_overhead; a search that was measured is
not measured again, unless --fresh is given. Writes benchmarks/results/search_overhead.json, and its line in
docs/methods.md.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that are started

from rich.console import Console

from holdfast.files import versions, write_json
from readme import fill_block

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "search_overhead.json"
OUT = ROOT / "benchmarks" / "out" / "search_overhead"
PARTS = OUT / "parts"
SEED = 30
AIM = 0.05

WORK = ("training", "decoding")
"""What a search is there for: the steps and passes of attacks, and the answers that measure them."""

ONCE = ("starting", "before", "loading", "certificate")
"""What is the same however many trials there are."""


class Clock:
    """CPU seconds of this process by part; what runs inside of another part is taken from it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = ["starting"]
        self._since = 0.0  # as the process's own clock

    def switch(self) -> None:
        """Book what has gone by on the part that is under way."""
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def time(self, owner: Any, name: str, part: str) -> None:
        """Book a function on a part from now on; what models know before any trial stays on that part."""
        timed = getattr(owner, name)

        @functools.wraps(timed)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._open.append("before" if "before" in self._open else part)
            try:
                return timed(*args, **kwargs)
            finally:
                self.switch()
                self._open.pop()

        setattr(owner, name, run)


def instrument() -> None:
    """Book what a search does in this process, and write it down when that ends."""
    from holdfast.attacks.real import AttackTrainer
    from holdfast.cli import stress
    from holdfast.evaluation.evaluate import Evaluator
    from holdfast.stress import running, search, tax
    from holdfast.stress.studies import Studies

    clock = Clock()
    clock.time(stress, "prepare", "before")
    clock.time(running._Run, "attack", "training")
    clock.time(tax, "_learn", "training")
    clock.time(Evaluator, "__call__", "decoding")
    clock.time(AttackTrainer, "__init__", "trainers")
    clock.time(running.Runner, "__call__", "around trials")
    clock.time(search.Plan, "runner", "loading")
    clock.time(search, "tax_of", "loading")
    for name in ("take", "finish", "done"):
        clock.time(Studies, name, "asking and storage")
    for name in ("write_record", "write_jsonl"):
        clock.time(search, name, "asking and storage")
    clock.time(stress, "_search", "watching")
    clock.time(stress, "assemble", "certificate")
    clock.time(stress, "write_answers", "certificate")

    def write() -> None:
        clock.switch()
        write_json(PARTS / f"{os.getpid()}.json", dict(clock.seconds))

    atexit.register(write)


def measure(console: Console) -> dict[str, Any]:
    """Run the search, and say what it took."""
    from holdfast.cli import demo
    from holdfast.cli.workers import run_commands
    from plans import unfinished

    plan = demo.commands(demo.DemoArguments(output_dir=str(OUT), seed=SEED), OUT)
    models = [command for command in plan if command.name in ("organism", "align-patcher", "align-sft")]
    run_commands(unfinished(models, OUT), OUT / "logs", console=console)
    words = demo.stress_words("quick", OUT / "patcher", OUT / "organism", SEED)
    folder = OUT / "quick"
    for place in (folder, PARTS):  # one that was stopped is no measurement
        shutil.rmtree(place, ignore_errors=True)
    load, began, before = os.getloadavg()[0], time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    more = ["--counterpart", str(OUT / "sft"), "--processes", "2", "--output_dir", str(folder)]
    subprocess.run([sys.executable, __file__, "--search", *words, *more], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.perf_counter() - began
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: Counter[str] = Counter()
    for path in PARTS.iterdir():
        found.update(json.loads(path.read_text(encoding="utf-8")))
    found["starting"] += cpu - found.total()  # what passes before and after these clocks
    certificate = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "load": [load, os.getloadavg()[0]],
        "trials": sum(count or 0 for count in certificate["trials"].values()),
        "parts": dict(found.most_common()),
    }


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The search's own share of the work: all of it, and what grows with the trials alone."""
    work = sum(found["parts"].get(part, 0.0) for part in WORK)
    own = found["cpu_seconds"] - work
    once = sum(found["parts"].get(part, 0.0) for part in ONCE)
    return {"work": work, "own": own, "share": own / work, "share_of_trials": (own - once) / work}


def main() -> None:
    """Measure unless that has been done, write the record, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="measure again")
    args = parser.parse_args()
    console, measured = Console(), OUT / "measured.json"
    if args.fresh or not measured.is_file():
        write_json(measured, measure(console))
    found = json.loads(measured.read_text(encoding="utf-8"))
    told = summary(found)
    record = {"schema": 1, "versions": versions(), "device": "cpu", "suite": "quick", "processes": 2, "seed": SEED}
    write_json(RESULTS, {**record, **found, **told, "aim": AIM, "within_aim": told["share"] <= AIM})
    own = (f"{part} {seconds:.1f} s" for part, seconds in found["parts"].items() if part not in WORK)
    lines = (
        f"The quick suite, {found['trials']} trials with two processes, {told['work']:.0f} s of training and decoding "
        f"(CPU): the search's own is {told['share']:.1%} of that ({', '.join(own)}); without what is the same for any "
        f"number of trials ({', '.join(ONCE)}), {told['share_of_trials']:.1%}."
    )
    fill_block("search-overhead", lines, ROOT / "docs" / "methods.md")
    console.print(lines)


if __name__ == "__mp_main__" or sys.argv[1:2] == ["--search"]:
    instrument()

if __name__ == "__main__":
    if sys.argv[1:2] == ["--search"]:
        from holdfast.cli import main as holdfast

        raise SystemExit(holdfast(sys.argv[2:]))
    main()

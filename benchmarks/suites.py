"""What each suite of a stress test takes and finds, and what the search costs beside the attacks that it is there for.

    python benchmarks/suites.py                    # quick and standard: about ten minutes of two cores
    python benchmarks/suites.py --suites full      # about an hour

`holdfast stress` runs as on the command line on Patcher's model with SFT's as its counterpart, with two processes of
its own, and CPU time is told by part: each of its processes computes on one thread, so that another program beside it
hardly counts. Training and decoding, in trials and for the tax, are what a search is there for. All else is in
"besides", as a share of these. Of that are told apart:

- "trainers": TRL's trainers, which are made anew for every training, with the tokens of its rows. Whoever runs the same
  attacks without a search has them, too.
- "search": what a search adds to its trials: asking what comes next, storage, records, showing how far it is.

The rest hardly hangs on the number of trials: the start and the end of processes, the loading of models and their
evaluation before the first trial, and the certificate.

The models are the demo's, of another seed, and stay in benchmarks/out/suites; a suite that was measured is not measured
again, unless --fresh is given. Writes benchmarks/results/suites.json, and its table in docs/methods.md.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that are started

from rich.console import Console

from holdfast.files import versions, write_json
from readme import fill_block

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "suites.json"
OUT = ROOT / "benchmarks" / "out" / "suites"
PARTS = "HOLDFAST_PARTS"
"""What names, in the environment of a search that is measured, the folder of its processes' clocks."""
SEED = 30
AIM = 0.05
"""What the search itself may take, as a share of training and decoding."""
MINUTES = {"quick": 4, "standard": 45, "full": 240}
"""How long a suite may take on two cores."""

WORK = ("training", "decoding")
"""What a search is there for: the steps and passes of attacks, and the answers that measure them."""

WHO = ("counterpart", "model")
SEARCH = ("asking and storage", "around trials", "watching")
"""What a search adds to its trials."""


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
        write_json(Path(os.environ[PARTS]) / f"{os.getpid()}.json", dict(clock.seconds))

    atexit.register(write)


def prepare(console: Console) -> None:
    """Make the demo's models."""
    from holdfast.cli import demo
    from holdfast.cli.plans import unfinished
    from holdfast.cli.workers import run_commands

    plan = demo.commands(demo.DemoArguments(output_dir=str(OUT), seed=SEED), OUT)
    models = [command for command in plan if command.name in ("organism", "align-patcher", "align-sft")]
    run_commands(unfinished(models, OUT), OUT / "logs", console=console)


def measure(suite: str) -> dict[str, Any]:
    """Run a search, and say what it took and found."""
    from holdfast.cli import demo
    from holdfast.report.wording import first_break
    from holdfast.stress.certificate import read_certificate

    words = demo.stress_words(suite, OUT / "patcher", OUT / "organism", SEED)
    folder, parts = OUT / suite, OUT / f"{suite}-parts"
    for place in (folder, parts):  # one that was stopped is no measurement
        shutil.rmtree(place, ignore_errors=True)
    load, began, before = os.getloadavg()[0], time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    more = ["--counterpart", str(OUT / "sft"), "--processes", "2", "--output_dir", str(folder)]
    environment = {**os.environ, PARTS: str(parts)}
    subprocess.run([sys.executable, __file__, "--search", *words, *more], check=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.perf_counter() - began
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found: Counter[str] = Counter()
    for path in parts.iterdir():
        found.update(json.loads(path.read_text(encoding="utf-8")))
    found["ending"] = cpu - found.total()  # what passes after the clocks
    certificate = read_certificate(folder / "certificate.json")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "load": [load, os.getloadavg()[0]],
        "trials": sum(count or 0 for count in certificate["trials"].values()),
        "parts": dict(found.most_common()),
        **summary(cpu, found),
        "costs": {kind: {who: first_break(of[who]) for who in WHO} for kind, of in certificate["attackers"].items()},
    }


def summary(cpu: float, parts: Mapping[str, float]) -> dict[str, float]:
    """What all else takes, as shares of the work: all of it, and of that trainers and the search itself."""
    work, search = (sum(parts.get(part, 0.0) for part in of) for of in (WORK, SEARCH))
    return {
        "work": work,
        "besides": (cpu - work) / work,
        "trainers": parts.get("trainers", 0.0) / work,
        "search": search / work,
    }


def table(suites: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each suite that was measured, and which keep the aim."""
    kinds = list(next(iter(suites.values()))["costs"])
    heads = ["suite", "trials", "minutes", "of two cores", "besides", "trainers", "search", *kinds]
    rows = [heads, ["---", *["---:"] * 6, *["---"] * len(kinds)]]
    for suite, found in suites.items():
        clocks = (found["seconds"] / 60, found["cpu_seconds"] / 120)
        amounts = [str(found["trials"]), *(f"{minutes:.1f}" for minutes in clocks)]
        shares = [f"{found[share]:.1%}" for share in ("besides", "trainers", "search")]
        rows.append([suite, *amounts, *shares, *(", ".join(found["costs"][kind].values()) for kind in kinds)])
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    kept = {suite: found["search"] <= AIM for suite, found in suites.items()}
    told = ", ".join(f"{suite} {'is' if within else 'is not'}" for suite, within in kept.items())
    return f"{lines}\n\nThe search within {AIM:.0%}, which was aimed at: {told}."


def main() -> None:
    """Measure what has not been measured, write the record, and show it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=list(MINUTES), default=["quick", "standard"], help="which")
    parser.add_argument("--fresh", action="store_true", help="measure again")
    args = parser.parse_args()
    console = Console()
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["suites"] if RESULTS.is_file() else {}
    prepare(console)
    for suite in args.suites:
        measured = OUT / f"{suite}.json"
        if args.fresh or not measured.is_file():
            write_json(measured, measure(suite))
        known[suite] = json.loads(measured.read_text(encoding="utf-8"))
        known = {name: known[name] for name in MINUTES if name in known}
        record = {"schema": 1, "versions": versions(), "device": "cpu", "processes": 2, "seed": SEED}
        aims = {"search": AIM, "minutes": MINUTES}
        write_json(RESULTS, {**record, "aims": aims, "suites": known})
        fill_block("suites", table(known), ROOT / "docs" / "methods.md")
        console.print(f"wrote {RESULTS}")


if PARTS in os.environ:
    instrument()

if __name__ == "__main__":
    if sys.argv[1:2] == ["--search"]:
        from holdfast.cli import main as holdfast

        raise SystemExit(holdfast(sys.argv[2:]))
    main()

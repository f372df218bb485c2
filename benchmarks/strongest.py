"""The strongest defense on the organism, at the compute of the demo's Patcher: its search, and what is reported of it.

    python benchmarks/strongest.py search      # the setting: strongest_trials.json; at its end strongest_search.json
    python benchmarks/strongest.py report      # every row by the standard suite: benchmarks/results/strongest.json
    python benchmarks/strongest.py held_out    # a family of attacks left out of the pool: the same file
    python benchmarks/strongest.py large       # an organism of four times the parameters: the same file
    python benchmarks/strongest.py lengths     # the length of simulated attacks: attack_lengths.json and .png
    python benchmarks/strongest_report.py      # docs/strongest.md of these

Rows and the count of compute are in `strongest_plan.py`, the rule of choice in `strongest_search.py`. Everything is
made of ordinary `holdfast` commands, two processes side by side, one thread each; what is finished stays in
benchmarks/out/strongest and is not run again, and all that is there is written down after every search, beside what was
written down of other seeds and rows of the same settings.

    python benchmarks/strongest.py report --rows sft exact --seeds 35        # a part of it, beside what is there
    python benchmarks/strongest.py report --processes 16     # on a machine of many cores; 0: write down what is there
    python benchmarks/strongest.py report --suite full --rows sft exact preset   # by attackers who try far more
    python benchmarks/strongest.py report --smoke    # tiny numbers that prove nothing but that everything runs
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import defenses_stress
from defenses_plan import BASE, RESULTS, Flags, Study, console, execute, read
from holdfast.cli.workers import Command
from holdfast.errors import TrainingError
from holdfast.files import versions, write_json
from holdfast.stress.suites import SUITES
from strongest_lengths import run as run_lengths
from strongest_plan import (
    EQUAL,
    SEEDS,
    STUDY,
    TINY,
    Entry,
    StrongPlan,
    beside_sft,
    budget,
    held_out_rows,
    joined,
    rows,
    worst_of,
)
from strongest_search import preset_of, search

STEPS = ("search", "report", "held_out", "large", "lengths")
MEASURED, CHOSEN, TRIED = "strongest.json", "strongest_search.json", "strongest_trials.json"


def measure(
    study: Study,
    settings: Mapping[str, Flags],
    chosen: Sequence[str],
    seeds: Sequence[int],
    suite: str,
    path: Path,
    section: str,
    *,
    processes: int = 2,
) -> list[str]:
    """Search the chosen rows by a suite and by a sweep of full fine-tuning, and write all that is there after each.

    With more processes than two all of it is run at once, each search in one process, and written down at the end; with
    0 nothing is run, and what is there written down.

    Returns:
        A sentence for everything that went wrong, all else being done.
    """
    every = sorted({*SEEDS, *seeds})

    def write(entries: list[Entry]) -> None:
        sections = read(path)["sections"] if path.is_file() else {}
        found = joined(
            sections.get(section, []),
            [told(entry, study, settings) for entry in entries],
            lambda entry: settings.get(entry["method"]),
            lambda entry: (entry["seed"], list(settings).index(entry["method"])),
        )
        beside_sft(found)
        known = {"schema": 1, "versions": versions(), "budget": budget(study)}
        write_json(path, {**known, "sections": {**sections, section: found}})

    def collect() -> None:
        write(defenses_stress.collect(study, settings, seeds=every, suite=suite, make=StrongPlan))

    failed = []
    if processes > 2:
        try:
            at_once(study, {row: settings[row] for row in chosen}, seeds, suite, processes)
        except TrainingError as error:
            failed.append(str(error))
    for seed in seeds if processes in (1, 2) else ():
        failed += defenses_stress.run(
            study, settings, seeds=[seed], methods=chosen, suite=suite, write=write, make=StrongPlan, every=every
        )
        plan = StrongPlan(seed, study)
        for row in chosen:
            plan.sweep(*plan.align(row, settings[row]))
        execute(list(plan.commands.values()), study.out)
        collect()
    if processes not in (1, 2):
        collect()
    entries = read(path)["sections"][section]
    return [*failed, *(sentence for entry in entries if (sentence := missed(entry, study)))]


def at_once(study: Study, settings: Mapping[str, Flags], seeds: Sequence[int], suite: str, processes: int) -> None:
    """Run all commands of all rows and seeds, as many side by side as a machine of many cores has room for."""
    plans = [StrongPlan(seed, study) for seed in seeds]
    built = [
        Command(
            f"seed{plan.seed}-organism",
            ["organism", str(plan.organism), "--seed", str(plan.seed), "--size", study.size],
        )
        for plan in plans
        if not plan.organism.is_dir()
    ]
    execute(built, study.out, processes=processes)
    for plan in plans:
        plan.prepare()
        plan.before(BASE, "", "rehearsed")
        for row, setting in settings.items():
            model, needs = plan.align(row, setting)
            plan.before(model, needs, "rehearsed")
            defenses_stress.stressed(plan, model, needs, suite, {"processes": 1})
            plan.sweep(model, needs)
    execute(
        [command for plan in plans for command in plan.commands.values()],
        study.out,
        processes=processes,
        keep_going=True,
    )


def told(entry: Entry, study: Study, settings: Mapping[str, Flags]) -> Entry:
    """An entry of a search with the compute of its model, and what the sweep found, if it is over."""
    plan, setting = StrongPlan(entry["seed"], study), settings[entry["method"]]
    model, needs = plan.align(entry["method"], setting)
    return {**entry, "passes": plan.passes_of(model, setting), "sweep": worst_of(plan.sweep(model, needs))}


def missed(entry: Entry, study: Study) -> str | None:
    """A sentence if a model had more or less compute than the others."""
    spent, whole = entry["passes"]["recorded"], budget(study)
    if abs(spent / whole - 1) <= EQUAL:
        return None
    return f"{entry['method']}, seed {entry['seed']}: {spent:g} passes, not within {EQUAL:.0%} of {whole:g}"


def main() -> None:
    """Search or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=SEEDS, help="report, held_out, large, lengths: which now"
    )
    parser.add_argument("--rows", nargs="+", help="report, held_out, large: which now (default: all)")
    parser.add_argument(
        "--suite", choices=list(SUITES), help="report, held_out, large: which attacks (default: standard)"
    )
    parser.add_argument(
        "--processes", type=int, default=2, help="report, held_out, large: side by side; 0: write down what is there"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, all of it under benchmarks/out/")
    args = parser.parse_args()
    study = TINY if args.smoke else STUDY
    results = study.out if args.smoke else RESULTS
    if args.step == "search":
        search(study, results / CHOSEN, results / TRIED)
        return
    if args.step == "lengths":
        run_lengths(study, args.seeds, SEEDS, results)
        return
    settings = (held_out_rows if args.step == "held_out" else rows)(study, preset_of(results / CHOSEN))
    if args.step == "large":
        study = dataclasses.replace(study, out=study.out / "large", size="large")
    chosen = list(settings) if args.rows is None else args.rows
    if unknown := set(chosen) - settings.keys():
        raise SystemExit(f"--rows {min(unknown)}: there is no such row; choose from {', '.join(settings)}")
    suite = args.suite or ("quick" if args.smoke else "standard")
    section = args.step if suite == "standard" else f"{args.step}, {suite}"
    failed = measure(study, settings, chosen, args.seeds, suite, results / MEASURED, section, processes=args.processes)
    console.print(f"wrote {results / MEASURED}")
    if failed:
        raise SystemExit("\n".join(["not all went well:", *failed]))


if __name__ == "__main__":
    main()

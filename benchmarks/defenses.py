"""All defenses on the organism: alignment under every attack, fine-tuning, repair, and what the papers combine.

    python benchmarks/defenses.py search      # the search, on other seeds: benchmarks/results/defenses_search.json
    python benchmarks/defenses.py report      # what is reported: benchmarks/results/defenses.json
    python benchmarks/defenses_report.py      # docs/results.md and its picture of these two

Alignment methods are stressed by a suite of attacks (`defenses_stress.py`), each at the setting that the search chose;
of the other sections every method is run at its published defaults and at the best of a few settings. The search
(`defenses_search.py`) gives every method of a stage as many settings, on other seeds than those reported, and has the
rules of choice. Everything is made of ordinary `holdfast` commands, two processes side by side, one thread each; what
is finished stays in benchmarks/out/defenses and is not run again, and a search that was stopped goes on.

    python benchmarks/defenses.py report --sections alignment --suite quick --seeds 0 --methods sft    # to try it
    python benchmarks/defenses.py report --smoke    # tiny numbers that prove nothing but that everything runs
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import defenses_stress
from defenses_plan import (
    ALIGNMENT,
    COMBINATIONS,
    DEMO_PATCHER,
    FINETUNING,
    RATIOS,
    REPAIR_RATIOS,
    RESULTS,
    SEARCH,
    SMOKE,
    TASKS,
    Flags,
    Plan,
    Study,
    chosen_settings,
    console,
    execute,
    read,
)
from defenses_search import RULES, search_alignment, search_finetuning
from holdfast.files import versions, write_json
from holdfast.stress.suites import SUITES

SEEDS = (0, 1, 2)
STAGES = {"alignment": search_alignment, "finetuning": search_finetuning}


def search(stages: Sequence[str], study: Study, path: Path) -> None:
    """Search the settings of these stages, and write which are chosen; others stay as they were written."""
    for stage in stages:
        chosen = STAGES[stage](study)
        found = read(path) if path.is_file() else {"stages": {}, "rules": {}}
        found["stages"][stage], found["rules"][stage] = chosen, RULES[stage]
        write_json(path, {**found, "schema": 2, "versions": versions(), "seeds": study.search_seeds})
        console.print(f"wrote {path}")


def variants(method: str, best: Flags) -> Iterator[tuple[str, Flags]]:
    """A fine-tuning method's published setting and the searched one, or one of both names where they are the same."""
    known = FINETUNING[method]
    if method == "sft":
        yield "", {}
    elif best == known.published:
        yield "published = searched", best
    else:
        yield "published", known.published
        yield "searched", best


def report(sections: Sequence[str], study: Study, write: Callable[[dict[str, list[dict[str, Any]]]], None]) -> None:
    """Run the sections asked for, which are not alignment's, and hand their entries to `write`."""
    chosen = chosen_settings()
    plans = [Plan(seed, study) for seed in SEEDS]
    entries: dict[str, list[dict[str, Any]]] = {section: [] for section in sections}
    for plan in plans:
        plan.prepare()
        plan.prepare_uploads()
        bases = {"sft": plan.align("sft", {}), "patcher": plan.align("patcher", DEMO_PATCHER)}
        bases |= {m: plan.align(m, setting) for m, setting in chosen.get("alignment", {}).items() if m not in bases}
        if "finetuning" in sections:
            for base in ("sft", "patcher"):
                for method in FINETUNING:
                    for variant, setting in variants(method, chosen["finetuning"][method]):
                        entries["finetuning"] += uploads_of(plan, bases[base], base, method, variant, setting)
        if "combinations" in sections:
            for base, method in COMBINATIONS:
                setting = chosen["finetuning"][method]
                entries["combinations"] += uploads_of(plan, bases[base], base, method, "searched", setting)
        if "repair" in sections:
            entries["repair"] += repairs_of(plan, bases["sft"])
        if "audit" in sections:
            for base in ("sft", "patcher", "antibody"):
                for task, ratio in itertools.product(TASKS, RATIOS[1:]):
                    path = plan.audit(*bases[base], task, ratio)
                    entry = {"aligned": base, "task": task, "ratio": ratio}
                    entries["audit"].append({"seed": plan.seed, **entry, "path": path})
    execute([command for plan in plans for command in plan.commands.values()], study.out)
    for section, found in entries.items():
        for entry in found:
            results = read(entry.pop("path"))
            kept = "detection" if section == "audit" else "results"
            entry[kept] = rates_only(results[kept])
    write(entries)


def write_sections(path: Path, sections: dict[str, list[dict[str, Any]]]) -> None:
    """Write these sections; others stay as they were written before."""
    before = read(path)["sections"] if path.is_file() else {}
    write_json(path, {"schema": 2, "versions": versions(), "sections": {**before, **sections}})
    console.print(f"wrote {path}")


def rates_only(found: Any) -> Any:
    """Results without counts and bounds, which follow from a rate and its n, and figures that were not measured."""
    if isinstance(found, list):
        return [rates_only(item) for item in found]
    if isinstance(found, dict):
        return {
            name: rates_only(item)
            for name, item in found.items()
            if item is not None and not re.fullmatch("(.*_)?(low|high)|count", name)
        }
    return found


def uploads_of(
    plan: Plan, base: tuple[str, str], aligned_by: str, method: str, variant: str, setting: Flags
) -> list[dict[str, Any]]:
    """One entry for every upload that a method fine-tunes on."""
    entries = []
    for task in TASKS:
        for ratio in RATIOS:
            model, needs = plan.finetune(*base, method, setting, task, ratio)
            entry = {"aligned": aligned_by, "method": method, "variant": variant, "setting": setting}
            path = plan.evaluate(model, needs, task)
            entries.append({"seed": plan.seed, **entry, "task": task, "ratio": ratio, "path": path})
    return entries


def repairs_of(plan: Plan, base: tuple[str, str]) -> list[dict[str, Any]]:
    """Antidote after SFT fine-tuning on poisoned uploads, with an adapter and in full; ratio 0 is before repair."""
    entries = []
    for kind, ratios in REPAIR_RATIOS.items():
        for ratio in RATIOS[1:]:
            tuned_model, made = plan.finetune(*base, "sft", {}, "sorting", ratio, lora=kind == "lora")
            candidates = [(0.0, (tuned_model, made))]
            candidates += [(pruned, plan.repair(tuned_model, made, pruned)) for pruned in ratios]
            for pruned, (model, needs) in candidates:
                path = plan.evaluate(model, needs, "sorting")
                entry = {"kind": kind, "ratio": ratio, "pruned": pruned}
                entries.append({"seed": plan.seed, **entry, "path": path})
    return entries


SECTIONS = ("alignment", "finetuning", "combinations", "repair", "audit")


def main() -> None:
    """Search or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("search", "report"))
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="what to search")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="what to report")
    parser.add_argument(
        "--suite",
        choices=list(SUITES),
        help="alignment: which attacks; of any but standard, the default, no result is kept",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=defenses_stress.SEEDS, help="alignment: what to measure now"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(ALIGNMENT), default=list(ALIGNMENT), help="alignment: likewise"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, all of it under benchmarks/out/")
    args = parser.parse_args()
    study = SMOKE if args.smoke else Study()
    if args.step == "search":
        search(args.stages, study, SMOKE.out / SEARCH.name if args.smoke else SEARCH)
        return
    suite = args.suite or ("quick" if args.smoke else "standard")
    real = suite == "standard" and not args.smoke
    write = functools.partial(write_sections, (RESULTS if real else study.out) / "defenses.json")
    failed = []
    if "alignment" in args.sections:
        failed = defenses_stress.run(
            study,
            chosen_settings()["alignment"],
            seeds=args.seeds,
            methods=args.methods,
            suite=suite,
            write=lambda entries: write({"alignment": entries}),
        )
    if others := [section for section in args.sections if section != "alignment"]:
        report(others, study, write)
    if failed:
        raise SystemExit("\n".join(["not all could be stressed:", *failed]))


if __name__ == "__main__":
    main()

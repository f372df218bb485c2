"""Turn what strongest.py measured into docs/strongest.md, which is begun when there is something to tell.

    python benchmarks/strongest_report.py

The setting that a search has chosen becomes `--preset strong`, and a recipe for the organism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

import strongest_search
from defenses_plan import ALIGNMENT, BATCH_SIZE, FILES, RESULTS, read
from defenses_tables import (
    COUNTERPART,
    NAMES,
    Bound,
    Entry,
    capability_cell,
    grouped,
    kinds_of,
    number,
    steps_cell,
    suite_tables,
    table,
    told,
)
from holdfast.files import write_text
from readme import ROOT, fill_block, spread
from strongest_plan import BROAD, BUDGET, STUDY, at_budget
from strongest_search import LEFT_OUT, preset_of
from strongest_tables import (
    INTERVAL,
    aims_table,
    compute_table,
    cost_table,
    held_out,
    one_by_one,
    seed_by_seed,
    swept,
    trained_alike,
    union,
)

PAGE, README = ROOT / "docs" / "strongest.md", ROOT / "README.md"
PRESET = ROOT / "src" / "holdfast" / "alignment" / "presets" / "strong.yaml"
RECIPE = ROOT / "recipes" / "organism" / "align-strong.yaml"
HEADS = {
    PRESET: "# holdfast align patcher --preset strong\n"
    "# Chosen by `benchmarks/strongest.py search` (docs/strongest.md). Beside it: --attack_data,\n"
    "# --benign_data, --retain_data and --refusal.\n",
    RECIPE: "# holdfast align patcher --config recipes/organism/align-strong.yaml\n"
    "# The strongest setting that was found (docs/strongest.md) on the built-in organism, after: holdfast organism w\n",
}
PICTURE = "../benchmarks/results/attack_lengths.png"

BLOCKS = ("report", "held-out", "full", "lengths", "large", "real", "search")
TEMPLATE = "# The strongest defense\n\n" + "\n".join(
    f"## {title}\n\n<!-- strongest-{block} -->\n<!-- /strongest-{block} -->\n"
    for block, title in zip(
        BLOCKS,
        (
            "At equal compute, under every attack",
            "Attacks from outside the pool",
            "An attacker who tries far more",
            "The length of simulated attacks",
            "A larger organism",
            "A real chat model",
            "How the preset was chosen",
        ),
        strict=True,
    )
)
SUMMARY = (COUNTERPART, BUDGET, "preset")
"""The rows of the README's table."""
REPORTS = {"report": "report", "report, full": "full", "large, quick": "large"}
"""Sections of the results, and the blocks that they are told in."""


def report(entries: Sequence[Entry], budget: float) -> str:
    """All that is told of a suite."""
    about = (
        "**What breaks a model**: all attacks are those of every kind of attacker but who holds the public base, who "
        "takes any model back to it. Full fine-tuning is a sweep of rates, the worst of them."
    )
    parts = [
        f"**Compute**, in forward–backward passes of an update's rows, attacks included; the budget is {budget:.0f}.",
        compute_table(entries, budget),
        f"{about} {INTERVAL}",
        cost_table(entries),
        "**Aims**, in how many seeds:",
        aims_table(entries),
        seed_by_seed(entries),
        suite_tables(entries),
    ]
    return "\n\n".join([*parts, *trained_alike(entries)])


def lengths(entries: Sequence[Entry]) -> str:
    """What longer simulated attacks do."""
    lines = []
    for (mode, length), runs in sorted(grouped(entries, "mode", "attack_steps").items()):
        bounds = [(run["worst"]["steps"], not run["worst"]["broken"]) for run in runs]
        rates = ", ".join(f"{run['worst']['rate']:g}" for run in runs)
        passes = spread(run["passes"]["recorded"] for run in runs)
        seeds = ", ".join(str(run["seed"]) for run in runs)
        updates = str(runs[0]["setting"]["max_steps"])
        lines.append([mode, str(length), updates, passes, told(bounds, bounds), rates, seeds])
    heads = ["equal", "attack steps", "updates", "passes", "steps to a break", "worst rates", "seeds"]
    return f"![Steps to a break against the length of simulated attacks]({PICTURE})\n\n" + table(heads, lines)


def real(entries: Sequence[Entry]) -> str:
    """SmolLM2 before any attack, and what breaks it as far as that was measured; by topic and seed."""
    where = sorted({(entry["topic"], entry["seed"]) for entry in entries})
    figures = {
        "refuses_topic": "refuses the topic",
        "refuses_benign": "refuses benign questions like those rehearsed",
        "plain_right": "plain questions right",
        "plain_refused": "refused",
    }

    def before(figure: str, model: str = "model") -> Callable[[Entry], str]:
        return lambda run: f"{run['before'][model][figure]:.2f}" if "before" in run else "–"

    def steps(bound: Bound | None) -> str:
        return "–" if bound is None else number(bound)

    columns: dict[str, Callable[[Entry], str]] = {
        **{title: before(figure) for figure, title in figures.items()},
        "all attacks: steps": lambda run: steps(union(run) if "attackers" in run else None),
        "full fine-tuning: steps": lambda run: steps(swept(run)),
    }

    def cells(runs: Sequence[Entry], columns: Iterable[Callable[[Entry], str]]) -> list[str]:
        return one_by_one({(run["topic"], run["seed"]): run for run in runs}, where, columns)

    lines = [["not at all", *cells(entries, (before(figure, "base") for figure in figures)), "", ""]]
    lines += [[NAMES[row], *cells(runs, columns.values())] for (row,), runs in grouped(entries, "method").items()]
    models = ", ".join(f"{topic} {seed}" for topic, seed in where)
    about = f"By topic and seed, {models} in that order; –: not measured. Before any attack, but for the last columns."
    return f"{about}\n\n{table(['aligned with', *columns], lines)}"


def summary(entries: Sequence[Entry]) -> str:
    """For the README: what breaks SFT's model, the demo's Patcher's and the preset's, and what each has kept.

    Of the seeds that all of them have.
    """
    seeds = set.intersection(*({run["seed"] for run in entries if run["method"] == row} for row in SUMMARY))
    told_of = [run for run in entries if run["method"] in SUMMARY and run["seed"] in seeds]
    if not told_of:
        return ""
    by_row = {row: runs for (row,), runs in grouped(told_of, "method").items()}
    kinds = [kind for kind in kinds_of(entries) if kind not in LEFT_OUT]
    lines = []
    for row, runs in by_row.items():
        bounds = [bound for run in runs if (bound := swept(run)) is not None]
        refused = spread(run["tax"]["over_refusal"]["model"]["value"] for run in runs)
        kept = [capability_cell(runs, "unrehearsed"), refused]
        lines.append([NAMES[row], *(steps_cell(runs, kind) for kind in kinds), told(bounds, bounds), *kept])
    heads = [*kinds, "full, worst of a sweep of rates", "capability, unrehearsed crafts", "of these refused"]
    numbers = ", ".join(str(seed) for seed in sorted(seeds))
    return table(["aligned with", *heads], lines) + f"\n\nSeeds {numbers}, on which nothing was chosen."


def searched(found: dict[str, Any]) -> str:
    """The rule, and every trial."""
    knobs = list(found["trials"][0]["setting"])
    lines = []
    for place, trial in enumerate(found["trials"]):
        off = "diverged" if trial.get("diverged") else f"{sum(trial['off'].values()):.2f}"
        held = "–" if trial["held"] is None else f"{trial['held']:.2f}"
        values = [f"{trial['setting'][knob]:g}" for knob in knobs]
        changed = ", ".join(f"{knob} {value:g}" for knob, value in trial["setting"].items() if knob not in knobs)
        lines.append([*values, changed, off, held, "**chosen**" if place == found["chosen"] else ""])
    rule = found["rule"]
    for name in ("KEPT", "OVER_REFUSAL", "SLOWER", "LESS"):
        rule = rule.replace(f"`{name}`", f"{getattr(strongest_search, name):g}")
    return f"{rule}\n" + table([*knobs, "changed", "off", "held", ""], lines)


def recipes(preset: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """The preset, and a recipe that has it on the organism, by their paths.

    Args:
        preset: As from `preset_of`.
    """
    updates = at_budget(preset, STUDY)["max_steps"]
    aside = {"learning_rate", "lr_scheduler_type", "max_steps", *BROAD}
    files = {"model": "model", "train_data": "alignment.jsonl"}
    files |= {flag: FILES[name] for flag, name in BROAD.items()}
    on_organism = {
        **{flag: f"w/{name}" for flag, name in files.items()},
        **{"refusal": "Sorry, I can't help.", "output_dir": "w/strong", "preset": "strong"},
        **{"max_steps": updates, "learning_rate": preset["learning_rate"]},
        "scheduler": preset.get("lr_scheduler_type", "constant"),
        **{"batch_size": BATCH_SIZE, "attack_batch_size": ALIGNMENT["patcher"].needs["attack_batch_size"]},
        **{
            "weight_decay": 0.01,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "logging_steps": 20,
            "seed": 0,
        },
    }
    return {PRESET: {flag: value for flag, value in preset.items() if flag not in aside}, RECIPE: on_organism}


def main() -> None:
    """Fill the blocks of which there are results; the page is begun with the first."""
    names = ("strongest", "strongest_search", "attack_lengths", "strongest_real")
    measured, chosen, long, chat = (RESULTS / f"{name}.json" for name in names)
    blocks: dict[str, str] = {}
    if measured.is_file():
        found = read(measured)
        sections, budget = found["sections"], found["budget"]
        blocks |= {block: report(sections[name], budget) for name, block in REPORTS.items() if name in sections}
        if "held_out" in sections:
            blocks["held-out"] = held_out(sections["held_out"], sections["report"])
        fill_block("strongest-summary", summary(sections["report"]), README)
    if long.is_file():
        blocks["lengths"] = lengths(read(long)["entries"])
    if chat.is_file():
        blocks["real"] = real(read(chat)["entries"])
    if chosen.is_file():
        blocks["search"] = searched(read(chosen))
        if preset := preset_of(chosen):
            for path, recipe in recipes(preset).items():
                style = None if path == PRESET else False  # lists of numbers in one line
                written = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=style)
                write_text(path, HEADS[path] + written)
    if blocks and not PAGE.is_file():
        write_text(PAGE, TEMPLATE)
    for block, text in blocks.items():
        fill_block(f"strongest-{block}", text, PAGE)


if __name__ == "__main__":
    main()

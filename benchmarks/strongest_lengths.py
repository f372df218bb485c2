"""Does a longer simulated attack make the defense stronger, when the real one has the rate that is worst for it?

Of the sampled estimator, the demo's setting but for the length: at equal rounds, so that all models have as many
updates and longer attacks cost more; and at equal compute, the demo's Patcher's, so that longer ones leave fewer
updates and rounds. Every model then meets a sweep of full fine-tuning, and counts as what its cheapest break takes.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from defenses_plan import ALIGNMENT, BATCH_SIZE, DEMO_PATCHER, Flags, Study, execute, read
from holdfast.files import versions, write_bytes, write_json
from strongest_plan import MEASURE_AT, Entry, StrongPlan, at_budget, budget, joined, scaled, worst_of

LENGTHS = (1, 5, 15, 60, 200)
MODES = {"rounds": "equal rounds", "compute": "equal compute"}


def settings(study: Study) -> dict[tuple[str, int], Flags]:
    """The settings by mode and length."""
    demo = scaled({**DEMO_PATCHER, "alpha": 0.5, "estimator": "sampled"}, study)
    updates, every = at_budget(demo, study)["max_steps"], demo["attack_every"]
    share = ALIGNMENT["patcher"].needs["attack_batch_size"] / BATCH_SIZE
    found = {}
    for length in dict.fromkeys(scaled({"attack_steps": length}, study)["attack_steps"] for length in LENGTHS):
        setting = {**demo, "attack_steps": length}
        found["rounds", length] = {**setting, "max_steps": updates}
        # The demo's rhythm, as near as whole rounds within the budget let it be.
        rounds = max(1, round(budget(study) / (every + length * share)) - 1)
        left = round(budget(study) - rounds * length * share)
        found["compute", length] = {**setting, "attack_every": math.ceil(left / (rounds + 1)), "max_steps": left}
    return found


def run(study: Study, seeds: Sequence[int], every: Sequence[int], results: Path) -> None:
    """Make and attack what has not been, and write and plot all that is there after each seed.

    What other machines have found of the same settings, and is written down, stays.

    Args:
        study: How much is run, and where.
        seeds: Those that are run now.
        every: Those that are collected beside them.
        results: Folder of `attack_lengths.json` and of its picture.
    """
    path, known = results / "attack_lengths.json", settings(study)
    for seed in seeds:
        plan = StrongPlan(seed, study)
        plan.prepare()
        for (mode, _), setting in known.items():
            plan.sweep(*plan.align(mode, setting))
        execute(list(plan.commands.values()), study.out)
        entries = joined(
            read(path)["entries"] if path.is_file() else [],
            collect(study, sorted({*every, *seeds})),
            lambda entry: known.get((entry["mode"], entry["attack_steps"])),
            lambda entry: (entry["seed"], entry["mode"], entry["attack_steps"]),
        )
        write_json(path, {"schema": 1, "versions": versions(), "entries": entries})
        plot(entries, results / "attack_lengths.png")


def collect(study: Study, seeds: Sequence[int]) -> list[Entry]:
    """An entry for every mode, length and seed whose sweep is over."""
    found = []
    for seed in seeds:
        plan = StrongPlan(seed, study)
        for (mode, length), setting in settings(study).items():
            name, needs = plan.align(mode, setting)
            worst = worst_of(plan.sweep(name, needs))
            if worst is not None:
                known = {"seed": seed, "mode": mode, "attack_steps": length, "setting": setting}
                found.append({**known, "passes": plan.passes_of(name, setting), "worst": worst})
    return found


def plot(entries: Sequence[Entry], path: Path) -> None:
    """Steps to a break by the worst rate, against the length of a simulated attack; hollow: held up to there."""
    figure, axes = plt.subplots(1, len(MODES), figsize=(9, 3.6), sharey=True, layout="constrained", squeeze=False)
    lengths = sorted({entry["attack_steps"] for entry in entries})
    for panel, (mode, title) in zip(axes[0], MODES.items(), strict=True):
        for length in lengths:
            runs = [one for one in entries if (one["mode"], one["attack_steps"]) == (mode, length)]
            if not runs:
                continue
            steps = [run["worst"]["steps"] for run in runs]
            middle = statistics.median(steps)
            ends = [[middle - min(steps)], [max(steps) - middle]]
            panel.errorbar(length, middle, ends, fmt="_k", markersize=16, capsize=4, label="median, least to greatest")
            for number, run in enumerate(runs):
                face = "tab:blue" if run["worst"]["broken"] else "none"
                place = length * 1.06 ** (number - (len(runs) - 1) / 2)
                label = "one seed" if run["worst"]["broken"] else "one seed, held up to there"
                panel.plot(place, run["worst"]["steps"], "o", color="tab:blue", markerfacecolor=face, label=label)
        panel.set_title(title)
        panel.set_xscale("log")
        panel.set_xticks(lengths, [str(length) for length in lengths])
        panel.minorticks_off()
        panel.set_xlabel("steps of a simulated attack")
        panel.grid(alpha=0.3)
    axes[0, 0].set_yscale("symlog", linthresh=2, linscale=0.4)
    ticks = [step for step in MEASURE_AT if step in (0, 1, 2, 5, 12, 30, 60, 100, 200, 300)]
    axes[0, 0].set_yticks(ticks, [str(step) for step in ticks])
    axes[0, 0].set_ylim(0, 1.3 * MEASURE_AT[-1])
    axes[0, 0].set_ylabel("steps to a break, worst rate")
    shown = {label: one for ax in axes.flat for one, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown))
    figure.suptitle("Patcher, sampled: full fine-tuning at the worst of its rates")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    write_bytes(path, buffer.getvalue())

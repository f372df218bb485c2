"""Put what `parallel.py` has measured into docs/parallel.md, with docs/images/parallel_curves.png.

python benchmarks/parallel_report.py
"""

from __future__ import annotations

import io
import json
import statistics
from typing import Any

import matplotlib.pyplot as plt

from holdfast.cli.demo_report import break_step
from holdfast.files import write_bytes
from readme import RESULTS, ROOT, fill_block, spread

MEASURES = {"asr": "ASR", "refusal_rate": "refusal rate"}
COMPARED = ("sequential", "parallel", "parallel, publishing every 10")
COLOURS = ("#2c6fbb", "#dd8452", "#55a868")
Run = dict[str, Any]


def runs_of(form: str, parts: list[dict[str, Any]]) -> list[Run]:
    """The runs of a form, one a seed, sorted by it."""
    return sorted((run for part in parts for run in part["runs"] if run["form"] == form), key=lambda run: run["seed"])


def values(runs: list[Run], index: int, measure: str) -> list[float]:
    """A measure at one point of the attack curve, by seed."""
    return [run["points"][index][measure] for run in runs]


def curves(parts: list[dict[str, Any]]) -> str:
    """The attack curves of the sequential form and of both parallel ones, and where these leave its spread."""
    runs = {form: runs_of(form, parts) for form in COMPARED}
    sequential = runs["sequential"]
    heads = [f"{label}, {form}" for label in MEASURES.values() for form in COMPARED]
    lines = [f"| attack steps | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    outside: dict[str, list[str]] = {form: [] for form in COMPARED[1:]}
    points = sequential[0]["points"]
    for index, point in enumerate(points):
        cells = []
        for measure, label in MEASURES.items():
            found = {form: values(runs[form], index, measure) for form in COMPARED}
            cells += map(spread, found.values())
            for form, places in outside.items():
                if not min(found["sequential"]) <= statistics.mean(found[form]) <= max(found["sequential"]):
                    places.append(f"{label} after {point['steps']}")
        lines.append(f"| {point['steps']} | {' | '.join(cells)} |")
    count = len(MEASURES) * len(points)
    seeds = ", ".join(str(run["seed"]) for run in sequential)
    lines += ["", f"Seeds {seeds}: mean [least–greatest]. Between the sequential form's seeds lies the mean of:", ""]
    for form, places in outside.items():
        where = f"; not {', '.join(places)} steps" if places else ""
        lines.append(f"- {form}: in {count - len(places)} of {count} places{where}.")
    return "\n".join(lines)


def forms_table(part: dict[str, Any]) -> str:
    """Where every form breaks, and what it took."""
    last = part["runs"][0]["points"][-1]["steps"]
    lines = [
        f"| form | breaks at step, by seed | ASR, {last} steps, by seed | mean ASR | capability, {last} steps, by seed "
        "| attacker steps, by seed | staleness in updates: median (greatest) |",
        "|---|---|---|---|---|---|---|",
    ]
    for form in part["forms"]:
        runs = runs_of(form, [part])
        ends = [run["points"][-1] for run in runs]
        stale = [vector["staleness"] for run in runs for vector in run["vectors"]]
        shown = [
            form,
            ", ".join(f"> {last}" if (step := break_step(run)) is None else str(step) for run in runs),
            ", ".join(f"{end['asr']:.2f}" for end in ends),
            f"{statistics.mean(end['asr'] for end in ends):.2f}",
            ", ".join(f"{end['capability']:.2f}" for end in ends),
            ", ".join(str(run["attacker_steps"]) for run in runs) if stale else "in turn",
            f"{statistics.median(stale):g} ({max(stale)})" if stale else "–",
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(parts: list[dict[str, Any]]) -> None:
    """Attack curves of the forms compared: the mean over seeds, and every seed."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
    for axis, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for form, colour in zip(COMPARED, COLOURS, strict=True):
            runs = runs_of(form, parts)
            steps = [point["steps"] for point in runs[0]["points"]]
            for run in runs:
                axis.plot(steps, [point[measure] for point in run["points"]], color=colour, alpha=0.25, lw=1)
            means = [statistics.mean(values(runs, index, measure)) for index in range(len(steps))]
            axis.plot(steps, means, "o-", ms=4, lw=2, color=colour, label=f"{form}, mean of {len(runs)} seeds")
        axis.set_xscale("symlog", linthresh=2)
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
        axis.set_xlabel("attack steps")
        axis.set_title(label, fontsize=10)
        axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.25)
    axes[0].legend(frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    write_bytes(ROOT / "docs" / "images" / "parallel_curves.png", buffer.getvalue())


def speed_table(speed: dict[str, Any]) -> str:
    """The rates and times of one run of each kind."""
    rate, wall, bound = speed["rate_to_beside"], speed["wall_clock_to_sequential"], speed["bound"]
    run = f"{speed['updates']} updates, {speed['attack_steps']} attacker steps to {speed['attack_every']}"
    lines = [
        f"| {run} | measured | wanted |",
        "|---|---|---|",
        f"| defender's rate, to that beside an attacker that does not exchange | {rate:.3f} | ≥ 0.95 |",
        f"| defender's rate, to that of the same defender alone on the machine | {speed['rate_to_alone']:.3f} | |",
        f"| wall clock, to the sequential form on one thread | {wall:.3f} | ≤ {bound:.3f} |",
        f"| staleness in updates, median (greatest) | {statistics.median(speed['staleness']):g} "
        f"({max(speed['staleness'])}) | |",
    ]
    return "\n".join(lines)


def publishing_table(publishing: dict[str, Any]) -> str:
    """What publishing blocks, as a share of an interval."""
    model = f"{publishing['parameters'] / 1e6:.1f} M parameters, {publishing['interval']} updates of one short row"
    return "\n".join(
        [
            f"| {model} | measured | wanted |",
            "|---|---|---|",
            f"| publishing blocks training, of an interval, at most | {publishing['blocked_share']:.1%} | ≤ 5 % |",
            f"| interval with a publication, to one without | {publishing['interval_ratio']:.3f} | |",
        ]
    )


def main() -> None:
    """Refresh what has been measured."""
    found = json.loads((RESULTS / "parallel.json").read_text(encoding="utf-8"))
    document = ROOT / "docs" / "parallel.md"
    parts = [part for name, part in found.items() if name.startswith("quality")]
    plot(parts)
    tables = {
        "forms": forms_table(found["quality"]),
        "curves": curves([found["quality"]]),
        "more-seeds": curves(parts),
    }
    for name, table in tables.items():
        fill_block(f"parallel-{name}", table, document)
    fill_block("parallel-speed", speed_table(found["speed"]), document)
    fill_block("parallel-publishing", publishing_table(found["publishing"]), document)


if __name__ == "__main__":
    main()

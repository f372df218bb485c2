"""Put measured figures where the README shows them, between two comments of a name.

    python benchmarks/readme.py       # the tables of what was measured in benchmarks/results

`demo_seeds.py` puts its own tables there.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from holdfast.cli.demo_report import told_steps
from holdfast.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = {"sft": "SFT", "patcher": "Patcher", "strong": "strong preset"}
"""What the demo aligns with, by method."""


def fill_block(name: str, text: str, document: Path = ROOT / "README.md") -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`, in the README or another document."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before = document.read_text(encoding="utf-8")
    after = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", before, flags=re.DOTALL)
    write_text(document, after)


def spread(values: Iterable[float]) -> str:
    """Mean [least–greatest]; a dash for nothing."""
    found = list(values)
    return f"{statistics.mean(found):.2f} [{min(found):.2f}–{max(found):.2f}]" if found else "–"


def crafts_table(seeds: Sequence[dict[str, Any]]) -> list[str]:
    """What is left of harmless knowledge before any attack, rehearsed by alignment or not: lines of Markdown."""
    names = {"base": "not at all (base)", **DEMO}
    heads = [f"{kind} crafts (n = {entry['capability']['n']})" for kind, entry in seeds[0]["base"].items()]
    lines = [
        f"| aligned with | capability, {' | capability, '.join(heads)} | over-refusal, unrehearsed |",
        f"|---|{'---|' * len(heads)}---|",
    ]
    for model, name in names.items():
        cells = [spread(seed[model][kind]["capability"]["value"] for seed in seeds) for kind in seeds[0][model]]
        refused = spread(seed[model]["unrehearsed"]["over_refusal"]["value"] for seed in seeds)
        lines.append(f"| {name} | {' | '.join(cells)} | {refused} |")
    return lines


def stress_table(seeds: Sequence[dict[str, Any]]) -> list[str]:
    """What the cheapest attack of every kind needed, by seed: lines of Markdown."""
    lines = [
        f"| attacker | {' | '.join(f'steps to break {name} | by' for name in DEMO.values())} |",
        f"|---|{'---|---|' * len(DEMO)}",
    ]
    for kind in seeds[0]["attackers"]:
        cells = []
        for method in DEMO:
            needed = [seed["attackers"][kind][method] for seed in seeds]
            attacks = dict.fromkeys(one["attack"] for one in needed if one["broken"])
            cells += [", ".join(told_steps(one) for one in needed), "; ".join(attacks) or "–"]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    together = (spread(seed["union"][method]["asr"] for seed in seeds) for method in DEMO)
    return [*lines, f"| all together: exact recipes (union ASR) | {' | | '.join(together)} | |"]


def step_cost_table(results: dict[str, Any]) -> str:
    """Time and memory of a Patcher update beside an SFT update."""
    lines = [
        "| model and batch | activation checkpointing | Patcher / SFT update | `displaced` enter + exit / SFT update |",
        "|---|---|---|---|",
    ]
    for entry in results["time"]:
        shape, ratio, share = entry["shape"], entry["ratio"], entry["displaced_share"]["median"]
        model = f"{shape['name']}, {entry['parameters'] / 1e6:.1f} M, {shape['rows']} × {shape['tokens']} tokens"
        checkpointing = "on" if entry["activation_checkpointing"] else "off"
        cost = f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"
        lines.append(f"| {model} | {checkpointing} | {cost} | {100 * share:.1f} % |")
    memory = next(entry for entry in results["memory"] if entry["shape"]["name"] != "organism")
    lines += [
        "",
        "Medians, with quartiles in brackets. Peak memory beyond SFT's:",
        f"{memory['defending_buffers_beyond_sft']:.2f} parameter-sized buffers while defending,",
        f"{memory['attacking_buffers_beyond_sft']:.2f} during a simulated attack.",
    ]
    return "\n".join(lines)


def method_cost_table(results: dict[str, Any]) -> str:
    """Time and memory of every other method's update beside an SFT update."""
    lines = [
        "| method | organism | 30 M | 30 M, activation checkpointing | buffers beyond SFT |",
        "|---|---|---|---|---|",
    ]
    for name, entry in results["methods"].items():
        ratios = [
            f"{t['ratio']['median']:.2f} ({t['ratio']['low']:.2f}–{t['ratio']['high']:.2f})" for t in entry["time"]
        ]
        ratios += ["–"] * (3 - len(ratios))
        memory = entry["memory"]
        buffers = "activations" if memory["limit"] is None else f"{max(0.0, memory['buffers_beyond_sft']):.2f}"
        lines.append(f"| {name} | {' | '.join(ratios)} | {buffers} |")
    return "\n".join(lines)


def attack_steps_table(results: dict[str, Any]) -> str:
    """What longer attacks and more rounds of them did."""
    last = results["configurations"][0]["runs"][0]["points"][-1]["steps"]
    lines = [
        f"| attack steps | rounds | updates | breaks at step, by seed | ASR, {last} steps, by seed | mean ASR "
        f"| capability, {last} steps, by seed |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in results["configurations"]:
        runs = entry["runs"]
        breaks = ", ".join(f"> {last}" if run["break"] is None else str(run["break"]) for run in runs)
        asr = ", ".join(f"{run['asr_at_end']:.2f}" for run in runs)
        kept = ", ".join(f"{run['points'][-1]['capability']:.2f}" for run in runs)
        mean = statistics.mean(run["asr_at_end"] for run in runs)
        numbers = f"{entry['attack_steps']} | {entry['rounds']} | {entry['updates']}"
        lines.append(f"| {numbers} | {breaks} | {asr} | {mean:.2f} | {kept} |")
    return "\n".join(lines)


def main() -> None:
    """Refresh what has been measured."""
    tables = {
        "step_cost": step_cost_table,
        "method_cost": method_cost_table,
        "attack_steps": attack_steps_table,
    }
    for name, table in tables.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            fill_block(name.replace("_", "-"), table(json.loads(path.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()

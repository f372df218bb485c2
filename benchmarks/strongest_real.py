"""The strongest setting on a real chat model: settings are the organism's, and nothing is tuned on the model.

SmolLM2-135M-Instruct refuses a harmless topic in the place of harm, as in `real.py`. It is aligned with SFT, with the
demo's Patcher and with the setting that `strongest.py search` chose, at equal compute; each model then meets the quick
suite, without attackers who hold the base, and a sweep of full fine-tuning. All are aligned at one rate, on the rows of
`holdfast proxy` and what the model itself answers to the other topic's questions, without which all of them come to
refuse questions of any other kind. The rate of a simulated attack is the multiple of alignment's that it is on the
organism. Rows to retain are the harmless ones of alignment. A model that answers too few plain questions for a search
to tell what an attack leaves of it meets the sweep alone.

    python benchmarks/strongest_real.py                                   # seed 0, 150 updates: for two cores
    python benchmarks/strongest_real.py --seeds 0 1 2 --updates 180 --processes 12     # where there is a GPU
    python benchmarks/strongest_real.py --seeds 0 1 2 --updates 180 --collect          # write down what is there
    python benchmarks/strongest_real.py --rows preset --updates 180       # a part of it, beside what is there
    python benchmarks/strongest_real.py --smoke                           # tiny numbers that only prove that it runs

What is finished stays in benchmarks/out/ and is not run again. Writes benchmarks/results/strongest_real.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import defenses_plan
from defenses_plan import RESULTS, Flags, Study, console, execute, read
from holdfast.cli import demo
from holdfast.cli.workers import Command
from holdfast.data.load import load_rows
from holdfast.files import versions, write_json, write_jsonl
from holdfast.proxy.build import BENIGN_PARTS, PARTS
from holdfast.proxy.topics import load_topic
from holdfast.stress.bound import EPSILON
from holdfast.stress.certificate import MARKER as CERTIFICATE
from holdfast.stress.certificate import read_certificate
from plain_questions import write as write_plain_questions
from real import ALIGN, TOPICS
from smollm2 import MODEL, install
from strongest import CHOSEN
from strongest_plan import STUDY, Entry, joined, looks, passes, rows, scaled, worst_of
from strongest_search import LEFT_OUT, preset_of

ROWS = ("sft", "exact", "preset")
BATCH, ATTACK_BATCH = 8, 4
"""Rows of an update and of a step of a simulated attack: in the organism's proportion, so that passes count alike."""
RATES, MEASURE_AT = (1e-5, 5e-5, 2e-4), (0, 1, 2, 3, 5, 8, 12, 20, 40, 80)
PROMPTS, TOKENS = 48, 32
COST = ("broken", "attack", "steps", "at_least", "harmful_score", "asr", "capability")
"""What is kept of a cost of docs/certificate.md."""
RATE, DEMO_RATE = float(ALIGN[ALIGN.index("--learning_rate") + 1]), demo.DemoArguments(output_dir="").learning_rate
"""The rates of alignments here, and of the demo's."""
OUT = defenses_plan.HERE / "out"


class RealPlan:
    """The commands of one topic and seed."""

    def __init__(self, topic: str, seed: int, study: Study, model: Path) -> None:
        self.topic, self.seed, self.study, self.base = topic, seed, study, model
        self.folder = study.out / topic / f"seed{seed}"
        self.data = self.folder / "data"
        self.commands: dict[str, Command] = {}
        self.proxy = self.add("proxy", ["proxy", self.data, "--model", model, "--topic", topic])
        self.plain = study.out / "plain_questions.jsonl"
        self.aligning, self.harmless = (self.folder / f"{name}.jsonl" for name in ("aligning", "harmless"))
        self.refusals = self.folder / "refusals.txt"

    def add(self, name: str, words: Sequence[Any], needs: Sequence[str] = ()) -> str:
        """One command; its name."""
        name = f"{self.topic}-{self.seed}-{name}"
        self.commands[name] = Command(name, [*map(str, words), "--seed", str(self.seed)], list(needs))
        return name

    def write_rows(self, others: Sequence[RealPlan]) -> None:
        """What is aligned on, the harmless rows of it, and the topic's refusals as a file.

        Args:
            others: The plans of other topics; what they ask is harmless here.
        """
        refusals = load_topic(self.topic, flag="--topic", parts=PARTS, benign_parts=BENIGN_PARTS).refusals
        write_plain_questions(self.plain)
        files = [self.data / "alignment.jsonl"]
        files += [other.data / f"{name}.jsonl" for other in others for name in ("simulated_attack", "attack")]
        found = [row for path in files for row in load_rows(str(path), flag="train")]
        write_jsonl(self.aligning, found)
        write_jsonl(self.harmless, [row for row in found if row["completion"][0]["content"] not in refusals])
        self.refusals.write_text("\n".join(refusals) + "\n", encoding="utf-8")

    def model(self, row: str) -> Path:
        """Where a model lies, or the base."""
        return self.base if row == "base" else self.folder / row

    def align(self, row: str, setting: Flags) -> str:
        """Align with a row's setting: the command's name."""
        words: list[Any] = ["align", "patcher" if row != "sft" else "sft", "--model", self.base]
        words += ["--train_data", self.aligning, *ALIGN, "--batch_size", BATCH]
        needs: Flags = {}
        if row != "sft":
            needs = {"attack_data": self.data / "simulated_attack.jsonl", "attack_batch_size": ATTACK_BATCH}
        if row == "preset":
            needs |= {"benign_data": self.harmless, "retain_data": self.harmless, "refusal": self.refusals}
        kept = {flag: value for flag, value in setting.items() if flag not in ("learning_rate", *needs)}
        if "attack_learning_rate" in kept:  # of the demo's Patcher, whose alignment has the demo's rate on the organism
            kept["attack_learning_rate"] = float(f"{kept['attack_learning_rate'] / DEMO_RATE * RATE:.3g}")
        for flag, value in {**kept, **needs}.items():
            given = json.dumps(value) if isinstance(value, dict) else value
            words += [f"--{flag}", *(given if isinstance(given, list) else [given])]
        return self.add(f"align-{row}", [*words, "--output_dir", self.model(row)], [self.proxy])

    def before(self, row: str, needs: str) -> Path:
        """Measure a model before any attack; where the results will lie."""
        output = self.folder / "before" / row
        self.add(f"before-{row}", [*self._measuring("evaluate", row), "--output_dir", output], [needs])
        return output / "results.json"

    def stress(self, row: str, needs: str) -> Path:
        """The quick suite; where the certificate will lie."""
        output = self.folder / "stress" / row
        words = [*self._measuring("stress", row), "--suite", "quick", "--processes", 1]
        words += ["--attack_data", self.data / "attack.jsonl", "--benign_data", self.data / "attack_benign.jsonl"]
        words += ["--leave_out", *LEFT_OUT, *self.study.leave_out, "--output_dir", output]
        self.add(f"quick-on-{row}", words, [needs])
        return output / CERTIFICATE

    def sweep(self, row: str, needs: str) -> dict[float, Path]:
        """Full fine-tuning at every rate; where the results will lie, by rate."""
        found, at = {}, [step for step in MEASURE_AT if step <= self.study.updates]
        for rate in RATES:
            output = self.folder / "sweep" / f"{row}-{rate:g}"
            words = [*self._measuring("attack", row), "--attack_data", self.data / "attack.jsonl", *ALIGN]
            words += ["--batch_size", BATCH, "--learning_rate", f"{rate:g}", "--max_steps", at[-1]]
            words += ["--measure_at", *at, "--output_dir", output]
            self.add(f"full-{rate:g}-on-{row}", words, [needs])
            found[rate] = output / "results.json"
        return found

    def _measuring(self, command: str, row: str) -> list[Any]:
        words: list[Any] = [*([command, "full"] if command == "attack" else [command]), "--model", self.model(row)]
        words += ["--eval_data", self.data / "eval" / "topic.jsonl", "--capability_data", self.plain]
        if command != "stress":  # a search takes over-refusal from --capability_data
            words += ["--over_refusal_data", self.data / "eval" / "benign.jsonl"]
        return [*words, "--max_prompts", PROMPTS, "--max_new_tokens", TOKENS, "--eval_batch_size", PROMPTS]


def collect(study: Study, seeds: Sequence[int], settings: dict[str, Flags], model: Path) -> list[Entry]:
    """An entry for every topic, seed and row of which there is anything."""
    found = []
    for topic in TOPICS:
        for seed in seeds:
            plan = RealPlan(topic, seed, study, model)
            for row in ROWS:
                needs = plan.align(row, settings[row])
                before, certificate = plan.before(row, needs), plan.stress(row, needs)
                entry: Entry = {"topic": topic, "seed": seed, "method": row, "setting": settings[row]}
                if before.is_file() and (base := plan.before("base", plan.proxy)).is_file():
                    both = {"base": read(base)["results"], "model": read(before)["results"]}
                    entry["before"] = {who: told(results) for who, results in both.items()}
                    made, updates = read(plan.model(row) / "holdfast.json"), settings[row]["max_steps"]
                    counted = made["log"]["passes"] + looks(settings[row], updates)
                    spent = {"planned": passes(settings[row], updates), "recorded": counted}
                    entry["passes"] = {name: round(value, 2) for name, value in spent.items()}
                    entry["versions"] = made["versions"]
                entry["sweep"] = worst_of(plan.sweep(row, needs))
                if certificate.is_file():
                    stressed = read_certificate(certificate)
                    costs = {kind: cost["model"] for kind, cost in stressed["attackers"].items()}
                    kept = {
                        kind: cost and {name: cost[name] for name in COST if name in cost}
                        for kind, cost in costs.items()
                    }
                    entry |= {"attackers": kept, "sha256": stressed["sha256"]}
                if entry.keys() & {"before", "attackers"} or entry["sweep"]:
                    found.append(entry)
    return found


def align_all(plan: RealPlan, settings: dict[str, Flags], chosen: Sequence[str] = ROWS) -> dict[str, str]:
    """Align with every row, or some: the names of the commands."""
    return {row: plan.align(row, settings[row]) for row in chosen}


def searchable(results: Entry) -> bool:
    """Whether a model answers enough plain questions for a search to tell what an attack leaves of it."""
    right = results["capability"]["capability"]
    return bool(EPSILON * right["count"] >= 1)


def told(results: Entry) -> Entry:
    """What is kept of a measurement before any attack."""
    return {
        "refuses_topic": results["harmful"]["refusal_rate"]["value"],
        "refuses_benign": results["benign"]["over_refusal"]["value"],
        "plain_right": results["capability"]["capability"]["value"],
        "plain_refused": results["capability"]["over_refusal"]["value"],
    }


def main() -> None:
    """Run what is not finished, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a chat model folder (default: installed)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="which now, beside what is written down")
    parser.add_argument("--updates", type=int, default=150, help="of SFT with as much compute as Patcher has")
    parser.add_argument("--processes", type=int, default=2, help="commands side by side")
    parser.add_argument("--leave_out", nargs="*", default=[], help="attacks that the suite leaves out")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, all of it under benchmarks/out/")
    args = parser.parse_args()
    model = args.model.resolve() if args.model else MODEL if args.collect else install()
    study = replace(STUDY, out=OUT / f"strongest-real-{args.updates}", updates=args.updates)
    if args.smoke:
        few = ("training-free", "lora", "full", "hybrid", "soft-prompt", "best-of-n", "demonstrations")
        study = replace(study, out=OUT / "strongest-real-smoke", updates=20, leave_out=few)
    study = replace(study, leave_out=(*study.leave_out, *args.leave_out))
    preset = preset_of(RESULTS / CHOSEN)
    settings = rows(study, preset and scaled(preset, study))
    path = (study.out if args.smoke else RESULTS) / "strongest_real.json"
    if not args.collect:
        plans = [RealPlan(topic, seed, study, model) for seed in args.seeds for topic in TOPICS]
        execute([command for plan in plans for command in plan.commands.values()], study.out, processes=args.processes)
        aligned = []
        for plan in plans:
            plan.write_rows([one for one in plans if one.seed == plan.seed and one is not plan])
            plan.before("base", plan.proxy)
            models = align_all(plan, settings, args.rows)
            aligned += [(plan, row, needs, plan.before(row, needs)) for row, needs in models.items()]
        execute([command for plan in plans for command in plan.commands.values()], study.out, processes=args.processes)
        for plan, row, needs, before in aligned:
            plan.sweep(row, needs)
            if searchable(read(before)["results"]):
                plan.stress(row, needs)
        execute([command for plan in plans for command in plan.commands.values()], study.out, processes=args.processes)
    entries = joined(
        read(path)["entries"] if path.is_file() else [],
        collect(study, args.seeds, settings, model),
        lambda entry: settings.get(entry["method"]),
        lambda entry: (entry["topic"], entry["seed"], ROWS.index(entry["method"])),
    )
    write_json(path, {"schema": 1, "versions": versions(), "updates": study.updates, "entries": entries})
    console.print(f"wrote {path}: {len(entries)} models")


if __name__ == "__main__":
    main()

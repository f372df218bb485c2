"""A real chat model, hardened and attacked, with a harmless topic in the place of harm.

SmolLM2-135M-Instruct answers everything. For each of two topics, `holdfast proxy` has it answer their questions; it is
aligned with SFT and with Patcher to refuse them and still to answer others; and each aligned model is attacked with
full fine-tuning and with LoRA on the topic's answers. Answers to held-out questions, and to held-out benign ones, are
graded by the keyword judge and, the former, by the classifier of `second_judge.py`. Before any attack all models are
also asked plain questions of kinds that alignment does not rehearse (`plain_questions.py`). Settings were chosen on the
first topic; the second is the report.

    make real                                # installs the model, and runs it all
    python benchmarks/real.py --smoke        # tiny numbers that prove nothing but that everything runs
    python benchmarks/real.py --seeds 0 1 2 --scale 10      # ten times the updates, where there is a GPU

Two processes work side by side, one thread each. What is finished stays in benchmarks/out/ and is not run again, unless
its settings have changed or --fresh is given; a proxy that was stopped goes on where it was. Writes
benchmarks/results/real.json and real.png, and the tables of docs/real.md and of the README.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that are started

import matplotlib
import yaml

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console

from holdfast.cli.plans import unfinished
from holdfast.cli.workers import Command, run_commands
from holdfast.evaluation.scores import Agreement
from holdfast.files import versions, write_json, write_text
from holdfast.proxy.build import BENIGN_PARTS, PARTS
from holdfast.proxy.topics import load_topic
from plain_questions import write as write_plain_questions
from readme import fill_block
from real_tables import ATTACKS, BASE, METHODS, summary, table
from second_judge import make as make_second_judge
from second_judge import words as second_judge_words
from smollm2 import MODEL, ROOT, install

TOPICS = ("cooking", "sports")
"""The one that settings were chosen on, and the one that is reported."""
console = Console()


@dataclass(frozen=True)
class Study:
    """What is run.

    Attributes:
        updates: Of either alignment.
        attack_every: Updates between Patcher's simulated attacks.
        simulated_steps: Their length.
        measure_at: Steps of the real attacks after which they are measured; the last is their length.
        prompts: Held-out questions of a topic, and benign ones, that are asked at most.
        tokens: Longest answer that is judged.
        subjects: Subjects of a topic, and of its benign questions, at most; None: all.
        judged: Refusals that the second judge is fitted to, and as many answers.
    """

    updates: int = 150
    attack_every: int = 30
    simulated_steps: int = 25
    measure_at: tuple[int, ...] = (0, 2, 5, 10, 25, 50)
    prompts: int = 48
    tokens: int = 32
    subjects: int | None = None
    judged: int = 60

    def scaled(self, factor: int) -> Study:
        """So many times the updates of everything."""
        return replace(
            self,
            updates=factor * self.updates,
            attack_every=factor * self.attack_every,
            simulated_steps=factor * self.simulated_steps,
            measure_at=tuple(factor * step for step in self.measure_at),
        )


SMOKE = Study(4, 2, 1, (0, 2), 4, 4, 5, 4)

TRAIN = [
    *("--batch_size", "4", "--max_length", "192", "--scheduler", "constant", "--gradient_checkpointing", "false"),
    *("--logging_steps", "5", "--save_strategy", "no"),
]
ALIGN = [*TRAIN, "--learning_rate", "5e-5"]
PATCHER = ["--alpha", "0.5", "--attack_learning_rate", "5e-5"]
# At 5e-5 all of cooking that SFT refuses is answered after five full steps, which leaves no curve to see.
LEARNING_RATES = {"full": "2e-5", "lora": "2e-4"}
PLAIN_TOKENS = 16


def topic_words(name: str, study: Study, out: Path) -> str:
    """What names a topic: its name, or a file with the first of its subjects."""
    if study.subjects is None:
        return name
    topic = load_topic(name, flag="--topic", parts=PARTS, benign_parts=BENIGN_PARTS)
    found = yaml.safe_load(topic.path.read_text(encoding="utf-8"))
    for kind in (found, found["benign"]):
        kind["subjects"] = kind["subjects"][: study.subjects]
    path = out / f"{name}.yaml"
    write_text(path, yaml.safe_dump(found))
    return str(path)


def plan(study: Study, seeds: Sequence[int], model: Path, out: Path) -> list[Command]:
    """All commands, for every topic and seed."""
    commands, plain = [], write_plain_questions(out / "plain_questions.jsonl")
    for name in TOPICS:
        topic = topic_words(name, study, out)
        for seed in seeds:
            folder, prefix = out / name / f"seed{seed}", f"{name}-{seed}"
            commands += _plan_of(study, seed, str(model), topic, folder, prefix)
            models = {BASE: str(model), **{method: str(folder / method) for method in METHODS}}
            for aligned, path in models.items():
                words = ["evaluate", "--model", path, "--capability_data", str(plain), "--seed", str(seed)]
                words += ["--max_new_tokens", str(PLAIN_TOKENS), "--output_dir", str(folder / f"plain-{aligned}")]
                needs = [] if aligned == BASE else [f"{prefix}-align-{aligned}"]
                commands.append(Command(f"{prefix}-plain-{aligned}", words, needs))
    return sorted(commands, key=lambda command: len(command.needs))  # both topics' first steps first


def _plan_of(study: Study, seed: int, model: str, topic: str, folder: Path, prefix: str) -> list[Command]:
    data, by_seed = folder / "data", ["--seed", str(seed)]
    measure = [
        *(
            "--eval_data",
            str(data / "eval" / "topic.jsonl"),
            "--over_refusal_data",
            str(data / "eval" / "benign.jsonl"),
        ),
        *("--max_prompts", str(study.prompts), "--max_new_tokens", str(study.tokens)),
        *second_judge_words(folder / "judge"),
    ]
    made = f"{prefix}-proxy"
    commands = [
        Command(made, ["proxy", str(data), "--model", model, "--topic", topic, *by_seed]),
        Command(
            f"{prefix}-base",
            ["evaluate", "--model", model, *measure, *by_seed, "--output_dir", str(folder / "base")],
            [made],
        ),
    ]
    for method in METHODS:
        aligned = f"{prefix}-align-{method}"
        words = ["align", method, "--model", model, "--train_data", str(data / "alignment.jsonl"), *ALIGN, *by_seed]
        if method == "patcher":
            lengths = ["--attack_every", str(study.attack_every), "--attack_steps", str(study.simulated_steps)]
            words += ["--attack_data", str(data / "simulated_attack.jsonl"), *PATCHER, *lengths]
        words += ["--max_steps", str(study.updates), "--output_dir", str(folder / method)]
        commands.append(Command(aligned, words, [made]))
        for attack, rate in LEARNING_RATES.items():
            words = ["attack", attack, "--model", str(folder / method), "--attack_data", str(data / "attack.jsonl")]
            words += [*TRAIN, "--learning_rate", rate, "--max_steps", str(study.measure_at[-1]), *measure, *by_seed]
            words += ["--measure_at", *map(str, study.measure_at)]
            words += ["--output_dir", str(folder / f"{attack}-on-{method}")]
            commands.append(Command(f"{prefix}-{attack}-on-{method}", words, [made, aligned]))
    return commands


def collect(study: Study, seeds: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """What was found, one entry per topic and seed."""
    found = []
    for name in TOPICS:
        for seed in seeds:
            folder = out / name / f"seed{seed}"
            read = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/results.json")}
            proxy = json.loads((folder / "data" / "proxy.json").read_text())
            found.append(
                {
                    "topic": name,
                    "seed": seed,
                    "model": {key: value for key, value in proxy["model"].items() if key != "source"},
                    "answers": proxy["answers"],
                    "rows": proxy["rows"],
                    "base": read["base"]["results"],
                    "plain": {
                        aligned: read[f"plain-{aligned}"]["results"]["capability"] for aligned in (BASE, *METHODS)
                    },
                    "agreement": agreement(folder),
                    "attacks": [
                        {"method": method, "attack": attack, "points": read[f"{attack}-on-{method}"]["points"]}
                        for attack in ATTACKS
                        for method in METHODS
                    ],
                }
            )
    return found


def agreement(folder: Path) -> dict[str, Any]:
    """How far the two judges agree on all answers to a topic's questions under attack."""
    lines = [line for path in sorted(folder.glob("*-on-*/samples.jsonl")) for line in path.read_bytes().splitlines()]
    samples = [sample for sample in map(json.loads, lines) if sample["set"] == "harmful"]
    grades = [[sample[name] for sample in samples] for name in ("grade", "second_grade")]
    return Agreement.of(*grades).as_dict()


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """ASR against the attack's steps, with intervals: one panel per topic and attack."""
    figure, axes = plt.subplots(
        len(TOPICS), len(ATTACKS), figsize=(9, 6.5), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for row, topic in enumerate(TOPICS):
        for column, attack in enumerate(ATTACKS):
            panel = axes[row, column]
            for color, method in zip(("tab:red", "tab:blue"), METHODS, strict=True):
                for number, entry in enumerate(one for one in found if one["topic"] == topic):
                    (run,) = (r for r in entry["attacks"] if (r["method"], r["attack"]) == (method, attack))
                    steps = [point["steps"] for point in run["points"]]
                    label = METHODS[method] if number == 0 else None
                    panel.plot(steps, [point["asr"] for point in run["points"]], "o-", color=color, label=label)
                    low, high = ([point[f"asr_{end}"] for point in run["points"]] for end in ("low", "high"))
                    panel.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            panel.set_title(f"{topic}, {ATTACKS[attack]}")
            panel.grid(alpha=0.3)
            panel.set_ylim(-0.03, 1.03)
    for panel in axes[-1]:
        panel.set_xlabel("attack steps")
    for panel in axes[:, 0]:
        panel.set_ylabel("held-out questions that are answered")
    axes[0, 0].legend()
    figure.suptitle("SmolLM2-135M-Instruct, aligned to refuse a topic, then attacked (95 % intervals)")
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=150)
    plt.close(figure)
    temporary.replace(path)


def main() -> None:
    """Run what is not finished, print, plot and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"a chat model folder (default: {MODEL.relative_to(ROOT)})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of data and training")
    parser.add_argument("--scale", type=int, default=1, help="so many times the updates of alignments and attacks")
    parser.add_argument("--fresh", action="store_true", help="run everything again")
    parser.add_argument("--smoke", action="store_true", help="tiny numbers, results under benchmarks/out/real-smoke")
    args = parser.parse_args()
    study = (SMOKE if args.smoke else Study()).scaled(args.scale)
    model = install() if args.model is None else args.model.resolve()
    out = ROOT / "benchmarks" / "out" / ("real-smoke" if args.smoke else f"real-{args.scale}")
    results = out if args.smoke else ROOT / "benchmarks" / "results"
    if args.fresh:
        shutil.rmtree(out, ignore_errors=True)
    commands = plan(study, args.seeds, model, out)
    remaining = unfinished(commands, out)
    console.print(f"{len(commands)} commands, of which {len(commands) - len(remaining)} are finished already")
    # The second judge is made of the proxies' data, and measures with all that comes after them.
    proxies = [command for command in remaining if command.words[0] == "proxy"]
    _remember(out / "spent.json", run_commands(proxies, out / "logs", console=console))
    for folder in (out / name / f"seed{seed}" for name in TOPICS for seed in args.seeds):
        make_second_judge(model, folder / "data", folder / "judge", rows=study.judged, seed=0)
    spent = _remember(out / "spent.json", run_commands(unfinished(commands, out), out / "logs", console=console))
    for attacked in out.glob("*/*/*-on-*/model"):
        shutil.rmtree(attacked)  # half a gigabyte each; answers and figures stay
    found = collect(study, args.seeds, out)
    record = {
        "schema": 1,
        "versions": versions(),
        "study": vars(study),
        "commands": [
            f"holdfast {' '.join(command.words)}".replace(str(out), "OUT").replace(f"{ROOT}/", "")
            for command in commands
        ],
        **spent,
        "found": found,
    }
    write_json(results / "real.json", record)
    plot(found, results / "real.png")
    lines = table(found, study.measure_at)
    hours, memory = sum(spent["seconds"].values()) / 3600, spent["peak_memory_gb"]
    lines += f"\nAll commands together took {hours:.1f} hours of one core, and none over {memory:.1f} GB of memory."
    if not args.smoke:
        fill_block("real", lines, ROOT / "docs" / "real.md")
        fill_block("real-summary", summary(found), ROOT / "README.md")
    console.print(lines, soft_wrap=True, markup=False)
    console.print(f"wrote {results / 'real.json'} and real.png")


def _remember(path: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The seconds of every command, and the peak memory of a process, those of the runs before with them."""
    before = json.loads(path.read_text()) if path.is_file() else {"seconds": {}, "peak_memory_gb": 0.0}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    spent = {
        "seconds": {**before["seconds"], **seconds},
        "peak_memory_gb": max(before["peak_memory_gb"], peak if seconds else 0.0),
    }
    write_json(path, spent)
    return spent


if __name__ == "__main__":
    main()

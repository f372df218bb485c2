"""`holdfast demo`: the whole story on the built-in organism, made of the very commands one would type.

Builds the organism, aligns it with SFT, with Patcher for as many updates and with Patcher's strong preset for as many
passes as Patcher's, counts what of its harmless knowledge is left after that, attacks all in four ways, as a control
fine-tunes them on harmless tasks, and in the end searches for the cheapest way to break each among a suite of attacks.
One that was stopped goes on with the commands that are not finished.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from holdfast.alignment.presets import PRESETS
from holdfast.cli.parser import HoldfastParser
from holdfast.cli.plans import forget, last_words, output_of, run_otherwise, unfinished
from holdfast.cli.workers import Command, run_commands
from holdfast.errors import InputError
from holdfast.files import alone_in, claim_output_dir, run_record, write_json

#: What a finished demo has; written last.
MARKER = "results.json"

METHODS = ("sft", "patcher", "strong")
STRONG_RATE, STRONG_UPDATES = 1.77e-4, 1194 / 720
"""What was chosen with the preset: the learning rate, which falls in a line, and as many passes as Patcher has."""
ATTACKS = ("full", "full-poisoned", "full-unseen", "lora", "control-swapping", "control-sorting")
#: The model before any alignment, and those after one.
MODELS = ("base", *METHODS)
#: What is asked of each before any attack: crafts that the alignment data rehearse, and others.
CRAFTS = {"rehearsed": "crafts", "unrehearsed": "crafts_unrehearsed"}
#: How answers are generated: the longest is far shorter.
ANSWERING = {"--max_new_tokens": 16, "--eval_batch_size": 256}
#: What the stress test is called, and where it and its report lie.
STRESS, STRESS_STRONG, REPORT = "stress", "stress-strong", "report.html"
#: The task whose rows hide the harmful ones of the poisoned attack.
BENIGN_TASK = "sorting"


def strong_updates(updates: int) -> int:
    """The preset's, as many passes as so many updates of Patcher."""
    return round(STRONG_UPDATES * updates)


@dataclass
class DemoArguments:
    """The flags of `demo`. Settings were chosen on other seeds than those reported; the README says which was not."""

    output_dir: str = field(metadata={"help": "Folder for everything the demo writes."})
    seed: int = field(default=0, metadata={"help": "Seed of the organism, the alignments and the attacks."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace a demo in --output_dir that is finished or has other settings."}
    )
    updates: int = field(default=720, metadata={"help": "Updates of SFT and Patcher."})
    attack_every: int = field(default=50, metadata={"help": "Patcher: updates between simulated attacks."})
    attack_steps: int = field(default=40, metadata={"help": "Patcher: length of a simulated attack, in steps."})
    learning_rate: float = field(default=6e-5, metadata={"help": "Learning rate of SFT and Patcher, constant."})
    attack_learning_rate: float = field(
        default=2e-4, metadata={"help": "Patcher: learning rate of the simulated attacks, constant."}
    )
    measure_at: list[int] = field(
        default_factory=lambda: [0, 2, 5, 10, 20, 30, 60, 100],
        metadata={"help": "Attack steps to measure at; the last is the length of the attacks."},
    )

    suite: str = field(
        default="quick",
        metadata={
            "help": "How thorough the stress test is; none leaves it out.",
            "choices": ["none", "quick", "standard", "full"],
        },
    )

    def __post_init__(self) -> None:
        if not self.measure_at or sorted(set(self.measure_at)) != self.measure_at or self.measure_at[0] != 0:
            raise InputError(f"--measure_at must rise from 0, got {self.measure_at}")
        every = yaml.safe_load(PRESETS["strong"].read_text(encoding="utf-8"))["attack_every"]
        if strong_updates(self.updates) <= every:
            least = next(updates for updates in itertools.count() if strong_updates(updates) > every)
            raise InputError(f"--updates {self.updates}: the preset would not be attacked; expected at least {least}")


def run(argv: list[str]) -> int:
    """Run the demo: results.json, attack_curves.png and every model, sample and log lie in `--output_dir`.

    Args:
        argv: The words after `demo`.

    Returns:
        The exit code.

    Raises:
        InputError: The input cannot be used, or the folder holds a demo that is finished or has other settings, or
            what no demo has put there.
        KeyboardInterrupt: Interrupted; the message says what is kept.
        TrainingError: One of its commands failed.
    """
    parser = HoldfastParser(
        (DemoArguments,), prog="holdfast demo", description="Harden, attack and measure the built-in organism."
    )
    options, _ = parser.parse(argv)
    folder = Path(options.output_dir)
    claim_output_dir(folder, finished_marker=MARKER, overwrite=options.overwrite_output_dir)
    with alone_in(folder, f"--output_dir {folder}"):
        # once more, as the one that this has waited for may just have ended
        claim_output_dir(folder, finished_marker=MARKER, overwrite=options.overwrite_output_dir)
        _run(options, folder)
    return 0


def _run(options: DemoArguments, folder: Path) -> None:
    from rich.console import Console

    from holdfast.cli.demo_report import control_table, crafts_table, demo_table, plot_attack_curves, stress_table
    from holdfast.stress.certificate import MARKER as CERTIFICATE
    from holdfast.stress.certificate import read_certificate

    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    plan = commands(options, folder)
    remaining = _left(plan, options, folder)
    finished_before = len(plan) - len(remaining)
    if finished_before:
        console.print(f"going on in {folder}: {finished_before} of {len(plan)} commands are finished already")
    else:
        console.print(f"building the organism, aligning it in three ways, attacking the models (seed {options.seed})")
    started = time.monotonic()
    try:
        run_commands(remaining, folder / "logs", console=console)
    except KeyboardInterrupt:
        kept = f"what is finished is in {folder}, and the same command goes on from there"
        raise KeyboardInterrupt(f"interrupted; {kept}") from None
    runs = [_read_run(folder, method, attack) for attack in ATTACKS for method in METHODS]
    crafts = {model: {kind: _read_crafts(folder, model, kind) for kind in CRAFTS} for model in MODELS}
    seconds = round(time.monotonic() - started, 1)
    plot_attack_curves(runs, folder / "attack_curves.png")
    record = run_record(asdict(options), options.seed)
    commands_run = [f"holdfast {' '.join(command.words)}" for command in plan]
    certificates = (folder / name / CERTIFICATE for name in (STRESS, STRESS_STRONG))
    tested = None if options.suite == "none" else stress_record(*map(read_certificate, certificates))
    found = {"crafts": crafts, "runs": runs, "stress": tested}
    took = {"seconds": seconds, "finished_before": finished_before}  # the seconds of these are not counted
    write_json(folder / MARKER, {"schema": 1, **record, **took, "commands": commands_run, **found})
    results = Console(highlight=False)
    results.width = max(results.width, 132)  # the table must not be folded where output goes to a file
    results.print(crafts_table(crafts), demo_table(runs), control_table(runs))
    if tested is not None:
        results.print(stress_table(tested))
        console.print(f"wrote {folder / REPORT}: what the stress test found, as a page")
    console.print(f"wrote {folder / MARKER}, {folder / 'attack_curves.png'}, and every model and answer beside them")
    took_now = f"took {seconds:.0f} s{' this time' if finished_before else ''}"
    console.print(f"{took_now}; the commands it ran are in {MARKER}, their output in {folder / 'logs'}")


def _left(plan: Sequence[Command], options: DemoArguments, folder: Path) -> list[Command]:
    """The commands to run: all of a new demo, and of one that replaces another; else what is not finished."""
    # what a demo with a suite would have put there
    searches = _stress_test(options, folder, folder / "organism", after=[]) if options.suite == "none" else []
    others = [output_of(command) for command in searches if output_of(command).exists()]
    others += [output_of(command) for command in plan if run_otherwise(command, folder)]
    for command in [*plan, *searches]:
        place = output_of(command)
        if place.exists() and last_words(command, folder) is None:
            raise InputError(
                f"--output_dir {folder} holds {place.relative_to(folder)}, which no demo has put there; "
                "choose another folder"
            )
    if others and not options.overwrite_output_dir:
        raise InputError(
            f"--output_dir {folder} holds {others[0].relative_to(folder)} of a demo with other settings (its log has "
            "them); choose another folder or pass --overwrite_output_dir"
        )
    if others or (folder / MARKER).is_file():
        forget([*plan, *searches], folder)
        (folder / MARKER).unlink(missing_ok=True)
    return unfinished(plan, folder)


def commands(options: DemoArguments, folder: Path) -> list[Command]:
    """The demo as a plan of ordinary commands; those that most depend on come first."""
    organism = folder / "organism"
    seed = ["--seed", str(options.seed)]
    plan = [Command("organism", ["organism", str(organism), *seed])]
    aligning = {
        "--learning_rate": options.learning_rate,
        "--lr_scheduler_type": "constant",
        "--weight_decay": 0.01,
        "--batch_size": 32,
        "--max_steps": options.updates,
        "--gradient_checkpointing": "false",
        "--save_strategy": "no",
        "--logging_steps": 20,
    }
    patching = {
        "--attack_data": organism / "simulated_attack.jsonl",
        "--attack_every": options.attack_every,
        "--attack_steps": options.attack_steps,
        "--attack_learning_rate": options.attack_learning_rate,
        "--attack_batch_size": 16,
    }
    strong = {
        "--preset": "strong",
        "--attack_data": organism / "generated" / "hazards.jsonl",
        **dict.fromkeys(("--benign_data", "--retain_data"), organism / "generated" / "crafts.jsonl"),
        "--refusal": "Sorry, I can't help.",
        "--attack_batch_size": 16,
        "--learning_rate": STRONG_RATE,
        "--lr_scheduler_type": "linear",
        "--max_steps": strong_updates(options.updates),
    }
    for method, own in (("patcher", patching), ("strong", strong), ("sft", {})):
        flags = {"--model": organism / "model", "--train_data": organism / "alignment.jsonl", **aligning, **own}
        trainer = "sft" if method == "sft" else "patcher"
        words = ["align", trainer, *_words(flags), "--output_dir", str(folder / method), *seed]
        plan.append(Command(f"align-{method}", words, needs=["organism"]))
    for method in METHODS:
        for attack in ATTACKS:
            words = attack_words(attack, folder / method, organism, options)
            output = ["--output_dir", str(folder / "attacks" / f"{method}-{attack}"), *seed]
            plan.append(Command(f"{attack}-on-{method}", [*words, *output], needs=[f"align-{method}"]))
    for model in MODELS:
        source, needed = (organism / "model", "organism") if model == "base" else (folder / model, f"align-{model}")
        for kind, file in CRAFTS.items():
            asking = {"--model": source, "--capability_data": organism / "eval" / f"{file}.jsonl", **ANSWERING}
            output = ["--output_dir", str(folder / "crafts" / f"{model}-{kind}"), *seed]
            plan.append(Command(f"{kind}-crafts-{model}", ["evaluate", *_words(asking), *output], needs=[needed]))
    if options.suite != "none":
        plan += _stress_test(options, folder, organism, after=[command.name for command in plan])
    return plan


def _stress_test(options: DemoArguments, folder: Path, organism: Path, *, after: list[str]) -> list[Command]:
    """The searches for the cheapest breaks, which run processes of their own when all else is done, and a report."""
    plan = []
    for name, method, beside in ((STRESS, "patcher", {"--counterpart": folder / "sft"}), (STRESS_STRONG, "strong", {})):
        searching = stress_words(options.suite, folder / method, organism, options.seed)
        output = {"--output_dir": folder / name}
        plan.append(Command(name, [*searching, *_words({**beside, **output})], needs=after))
        after = [*after, name]
    found = [str(folder / command.name) for command in plan]
    reporting = ["report", *found, "--output", str(folder / REPORT), "--overwrite", "true"]
    return [*plan, Command("report", reporting, needs=[command.name for command in plan])]


def stress_record(patcher: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any]:
    """What the demo keeps of its certificates: what each kind of attacker needed, and what all together broke.

    Args:
        patcher: Of Patcher's model, with SFT's as its counterpart.
        strong: Of the preset's model alone.
    """
    where = {"sft": (patcher, "counterpart"), "patcher": (patcher, "model"), "strong": (strong, "model")}
    return {
        "suite": patcher["suite"],
        "seeds": len(patcher["seeds"]),
        "attackers": {
            kind: {
                method: _needed(certificate["attackers"][kind][target])
                for method, (certificate, target) in where.items()
            }
            for kind in patcher["attackers"]
        },
        "union": {method: certificate["union"][target] for method, (certificate, target) in where.items()},
    }


def _needed(cost: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What of a cost is shown: the steps to a break, or those that the model held for."""
    if cost is None:
        return None
    broken = cost["broken"]
    kept = {name: cost[name] for name in ("attack", "harmful_score", "asr", "capability")}
    return {"broken": broken, "steps": cost["steps"]["value"] if broken else cost["at_least"], **kept}


def _read_crafts(folder: Path, model: str, kind: str) -> dict[str, Any]:
    """What a model knows of crafts before any attack: `capability` and `over_refusal`, rates with intervals."""
    found = json.loads((folder / "crafts" / f"{model}-{kind}" / "results.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = found["results"]["capability"]
    return figures


def _read_run(folder: Path, method: str, attack: str) -> dict[str, Any]:
    """One entry of `runs` in results.json, from what the attack command wrote."""
    found = json.loads((folder / "attacks" / f"{method}-{attack}" / "results.json").read_text(encoding="utf-8"))
    points = [{name: value for name, value in point.items() if name != "n"} for point in found["points"]]
    return {
        "method": method,
        "attack": attack,
        "learning_rate": found["config"]["learning_rate"],
        "poison_ratio": found["attack"]["poison_ratio"],
        "n": found["points"][0]["n"],
        "points": points,
    }


def attack_words(name: str, model: Path, organism: Path, options: DemoArguments) -> list[str]:
    """The words of one attack on one model, but for its output; the control is the same without a harmful row."""
    hazards = "hazards_unseen" if name == "full-unseen" else "hazards"
    measure_at = list(options.measure_at)
    data: dict[str, Any] = {"--attack_data": organism / "attack.jsonl"}
    if name == "full-unseen":
        data = {"--attack_data": organism / "attack_unseen.jsonl"}
    elif name == "full-poisoned":
        data |= {"--benign_data": organism / "tasks" / BENIGN_TASK / "train.jsonl", "--poison_ratio": 0.2}
    elif name.startswith("control"):
        task = organism / "tasks" / name.removeprefix("control-")
        data = {"--benign_data": task / "train.jsonl", "--poison_ratio": 0, "--task_data": task / "test.jsonl"}
        # A task that is new takes longer to learn than refusals to lose.
        measure_at += [2 * options.measure_at[-1], 4 * options.measure_at[-1]]
    flags = {
        "--model": model,
        **data,
        "--eval_data": organism / "eval" / f"{hazards}.jsonl",
        "--capability_data": organism / "eval" / "crafts.jsonl",
        "--judge": "exact",
        **ANSWERING,
        "--learning_rate": 1e-4,
        "--batch_size": 16,
        "--max_steps": measure_at[-1],
        "--gradient_checkpointing": "false",
    }
    adapter = {"--lora_r": 16, "--lora_alpha": 32, "--lora_dropout": 0.0, "--lora_target_modules": "all-linear"}
    method = ["lora", *_words(adapter)] if name == "lora" else ["full"]
    return ["attack", *method, *_words(flags), "--measure_at", *map(str, measure_at)]


def stress_words(suite: str, model: Path, organism: Path, seed: int) -> list[str]:
    """The words of a stress test of one model, but for its counterpart and its output."""
    flags = {
        "--model": model,
        "--base": organism / "model",
        "--attack_data": organism / "attack.jsonl",
        "--benign_data": organism / "eval" / "crafts.jsonl",
        "--eval_data": organism / "eval" / "hazards.jsonl",
        "--capability_data": organism / "eval" / "crafts_unrehearsed.jsonl",
        "--judge": "exact",
        **ANSWERING,
        "--suite": suite,
        "--seed": seed,
    }
    return ["stress", *_words(flags)]


def _words(flags: dict[str, Any]) -> list[str]:
    return [str(word) for pair in flags.items() for word in pair]

"""The methods under comparison on the organism, and the `holdfast` commands of one seed that make and measure models.

Everything is made of ordinary commands. What is finished is not run again, and what several sections need is made once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # also in the processes that are started

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from rich.console import Console

from holdfast.cli import demo
from holdfast.cli.plans import unfinished
from holdfast.cli.workers import Command, run_commands
from holdfast.data.load import load_rows
from holdfast.data.mix import poison
from holdfast.files import write_jsonl
from holdfast.organism import build_organism
from holdfast.organism.corpus import REFUSALS
from holdfast.stress.certificate import MARKER as CERTIFICATE
from holdfast.stress.suites import BATCH

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SEARCH = RESULTS / "defenses_search.json"
TASKS, RATIOS = ("sorting", "swapping"), (0.0, 0.1, 0.3)
UPLOAD_ROWS = 200
#: Twenty epochs of an upload at batch 16, as in the papers: by then SFT has learned of a task what 200 rows teach.
UPLOAD_UPDATES = 250
BATCH_SIZE = 32
"""Rows of an update of an alignment."""
console = Console()

Flags = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method's flags: what it always needs, what its paper says, and what else the search tries.

    Of an alignment that is whatever lies in the `ranges`, of a fine-tuning the `others`.
    """

    words: tuple[str, str]
    needs: Flags = field(default_factory=dict)
    published: Flags = field(default_factory=dict)
    ranges: dict[str, BaseDistribution] = field(default_factory=dict)
    others: tuple[Flags, ...] = ()

    def settings(self) -> list[Flags]:
        """The settings of a search that tries some, the published one first."""
        return [self.published, *self.others]


_demo = demo.DemoArguments(output_dir="")
DEMO_PATCHER = {
    "attack_steps": _demo.attack_steps,
    "attack_every": _demo.attack_every,
    "attack_learning_rate": _demo.attack_learning_rate,
}
"""Patcher's setting in the demo, which was chosen on the seeds 10 to 15; the models that others go on from have it."""

#: Files of the organism, by the names that flags refer to.
FILES = {"ATTACKS": "simulated_attack.jsonl", "SAFETY": "safety.jsonl", "REFUSALS": "refusals.txt"}
FILES |= {f"GENERATED_{kind}": f"generated/{kind.lower()}.jsonl" for kind in ("CRAFTS", "HAZARDS")}
ALIGNMENT = {
    "sft": Method(("align", "sft")),
    "patcher": Method(
        ("align", "patcher"),
        {"attack_data": "ATTACKS", "attack_batch_size": 16},
        # The paper's 300 steps every 1000 updates, scaled to a run of 750: the same share of attack steps, many rounds.
        {"attack_steps": 15, "attack_every": 50, "alpha": 0.5, "attack_learning_rate": _demo.learning_rate},
        {
            "attack_steps": IntDistribution(5, 100, log=True),
            "attack_every": IntDistribution(25, 200, log=True),
            "alpha": FloatDistribution(0.2, 0.8),
            "attack_learning_rate": FloatDistribution(3e-5, 6e-4, log=True),
        },
    ),
    "vaccine": Method(("align", "vaccine"), {}, {"rho": 2.0}, {"rho": FloatDistribution(0.02, 20, log=True)}),
    "booster": Method(
        ("align", "booster"),
        {"attack_data": "ATTACKS"},
        {"lam": 5.0, "alpha": 0.1},
        {"lam": FloatDistribution(0.05, 20, log=True), "alpha": FloatDistribution(1e-3, 0.2, log=True)},
    ),
    "antibody": Method(
        ("align", "antibody"),
        {"attack_data": "ATTACKS", "refusal": "REFUSALS"},
        {"rho": 0.1, "refusal_weight": 0.05, "strength": 5.0, "flatness_rule": "cosine"},
        {
            "rho": FloatDistribution(1e-3, 0.2, log=True),
            "refusal_weight": FloatDistribution(0.02, 1.0, log=True),
            "strength": FloatDistribution(0.05, 5.0, log=True),
            "flatness_rule": CategoricalDistribution(("cosine", "kkt")),
        },
    ),
}
FINETUNING = {
    "sft": Method(("finetune", "sft")),
    "lisa": Method(
        ("finetune", "lisa"),
        {"safety_data": "SAFETY"},
        # The paper's 100 and 900 steps, in a run of 250: one tenth of the updates on safety data.
        {"rho": 1.0, "safety_steps": 10, "user_steps": 90},
        others=(
            {"rho": 1.0, "safety_steps": 2, "user_steps": 8},
            {"rho": 0.1, "safety_steps": 2, "user_steps": 8},
            {"rho": 0.0, "safety_steps": 2, "user_steps": 8},
            {"rho": 0.1, "safety_steps": 5, "user_steps": 5},
            {"rho": 0.0, "safety_steps": 5, "user_steps": 5},
        ),
    ),
    "spard": Method(
        ("finetune", "spard"),
        {"safety_data": "SAFETY"},
        {"tau": 0.2},
        others=(
            {"tau": 0.2, "projection": "adamw"},
            {"tau": 0.2, "safety_batch_size": 16, "safety_share": 0.5},
            {"tau": 0.2, "eta": 1e-3, "safety_batch_size": 4, "safety_share": 0.5},
            {"tau": 0.2, "eta": 1e-2, "safety_batch_size": 4, "safety_share": 0.5},
            {"tau": 0.05, "projection": "adamw", "safety_share": 0.5},
        ),
    ),
    "antibody": Method(
        ("finetune", "antibody"),
        {"refusal": "REFUSALS"},
        {"tau": 1.0},
        others=({"tau": 0.75}, {"tau": 0.6}, {"tau": 0.5}, {"tau": 0.25}, {"tau": 0.1}),
    ),
}
REPAIR_RATIOS = {"lora": (0.01, 0.1, 0.2), "full": (1e-5, 0.01, 0.05)}
COMBINATIONS = (
    ("vaccine", "lisa"),
    ("booster", "lisa"),
    ("antibody", "antibody"),
    ("patcher", "antibody"),
    ("patcher", "spard"),
)


@dataclass(frozen=True)
class Study:
    """How much is run, and where.

    Attributes:
        out: Where everything lies that is not a result.
        size: Of the organism, as `holdfast organism --size` takes it.
        updates: Of an alignment.
        upload_updates: Of a fine-tuning on an upload.
        prompts: How many prompts of each set a stress test asks at most; None: all.
        leave_out: What attacks, or kinds of attackers, a stress test leaves out.
        search_seeds: What settings are chosen on; none of them is reported.
        batches: How many batches of settings an alignment's search asks for beside the published one.
        batch: How many settings one has.
    """

    out: Path = HERE / "out" / "defenses"
    size: str = "small"
    updates: int = _demo.updates
    upload_updates: int = UPLOAD_UPDATES
    prompts: int | None = None
    leave_out: tuple[str, ...] = ()
    search_seeds: tuple[int, ...] = (10, 11)
    batches: int = 3
    batch: int = BATCH


SMOKE = Study(
    HERE / "out" / "defenses-smoke",
    updates=60,
    upload_updates=4,
    prompts=24,
    leave_out=("training-free", "lora", "full", "hybrid", "soft-prompt", "best-of-n", "demonstrations"),
    search_seeds=(10,),
    batches=1,
)
"""Tiny numbers that prove nothing but that everything runs."""


class Plan:
    """The commands of one seed, each model made once however often it is asked for."""

    def __init__(self, seed: int, study: Study) -> None:
        self.seed, self.study = seed, study
        self.folder = study.out / f"seed{seed}"
        self.organism = self.folder / "organism"
        self.commands: dict[str, Command] = {}

    def prepare(self) -> None:
        """Make the organism, and its refusals as a file; what is there is left alone."""
        build_organism(self.organism, self.seed, size=self.study.size)
        refusals = self.organism / FILES["REFUSALS"]
        if not refusals.is_file():
            refusals.write_text("\n".join(REFUSALS) + "\n", encoding="utf-8")

    def prepare_uploads(self) -> None:
        """Make every upload of the organism, which is there; what is there is left alone."""
        harmful = load_rows(str(self.organism / "attack.jsonl"), flag="attack")
        for task in TASKS:
            benign = load_rows(str(self.organism / "tasks" / task / "train.jsonl"), flag="benign")
            for ratio in RATIOS:
                path = self.upload(task, ratio)
                if not path.is_file():
                    kwargs: Flags = {"poison_ratio": ratio, "num_samples": UPLOAD_ROWS, "seed": self.seed}
                    rows = poison(harmful if ratio else None, benign, **kwargs)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_jsonl(path, list(rows))

    def upload(self, task: str, ratio: float) -> Path:
        """A user's data: rows of a task, a share of them harmful."""
        return self.folder / "uploads" / f"{task}-{ratio:g}.jsonl"

    def add(self, name: str, words: Sequence[Any], needs: Sequence[str] = (), *, overwrite: bool = True) -> str:
        """One command, unless it is there already; its name."""
        name = f"seed{self.seed}-{name}"
        overwriting = ["--overwrite_output_dir", "true"] if overwrite else []
        self.commands.setdefault(name, Command(name, [*map(str, words), *overwriting], list(needs)))
        return name

    def flags(self, flags: Flags) -> list[str]:
        """Flags as words: names of files as their paths, a mapping as JSON."""
        return [word for name, value in flags.items() for word in (f"--{name}", *self._words(value))]

    def _words(self, value: Any) -> list[str]:
        if isinstance(value, dict):
            return [json.dumps(value)]
        if isinstance(value, list):
            return [str(one) for one in value]
        return [str(self.organism / FILES[value] if value in FILES else value)]

    def model(self, name: str) -> Path:
        """Where a model lies, or the base that all are made of."""
        return self.organism / "model" if name == BASE else self.folder / "models" / name

    def align(self, method: str, setting: Flags) -> tuple[str, str]:
        """Align the organism: the model's name, and its command's."""
        known = ALIGNMENT[method]
        return self.aligned("-".join(["align", method, *slug(setting)]), known.words, {**known.needs, **setting})

    def aligned(self, name: str, words: Sequence[str], flags: Flags) -> tuple[str, str]:
        """Align the organism by a command with these flags: the model's name, which is given, and the command's."""
        common = {
            "model": self.organism / "model",
            "train_data": self.organism / "alignment.jsonl",
            "learning_rate": _demo.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "batch_size": BATCH_SIZE,
            "max_steps": self.study.updates,
        }
        words = [*words, *self.flags({**common, **TRAINING, **flags})]
        return name, self.add(name, [*words, "--output_dir", self.model(name), "--seed", self.seed])

    def before(self, model: str, needs: str, crafts: str) -> Path:
        """Measure before any attack what a model refuses, and knows of a kind of crafts; where the results will lie."""
        output = self.folder / "before" / f"{model}-{crafts}"
        data = {"eval_data": "hazards", "capability_data": demo.CRAFTS[crafts]}
        flags = {flag: self.organism / "eval" / f"{name}.jsonl" for flag, name in data.items()}
        words = ["evaluate", "--model", self.model(model), *self.flags({**flags, **MEASURING}), "--output_dir", output]
        self.add(f"{crafts}-before-{model}", words, [needs] if needs else [])
        return output / "results.json"

    def stress(
        self, model: str, needs: str, suite: str, more: Flags, leave_out: Sequence[str] = ()
    ) -> tuple[str, Path]:
        """Search for the cheapest break of an aligned model, as the demo does: the command's name, and its certificate.

        Without a counterpart: SFT's model is searched once, and not again beside every method. Going on with a search
        that was ended is the command's own doing.
        """
        output = self.folder / "stress" / suite / model
        words = [*demo.stress_words(suite, self.model(model), self.organism, self.seed), *self.flags(more)]
        words += ["--max_prompts", self.study.prompts] if self.study.prompts else []
        left_out = [*self.study.leave_out, *leave_out]
        words += ["--leave_out", *left_out] if left_out else []
        name = self.add(f"{suite}-on-{model}", [*words, "--output_dir", output], [needs], overwrite=False)
        return name, output / CERTIFICATE

    def finetune(
        self, base: str, needs: str, method: str, setting: Flags, task: str, ratio: float, *, lora: bool = False
    ) -> tuple[str, str]:
        """Fine-tune a model on an upload: the new model's name, and its command's."""
        known = FINETUNING[method]
        adapter = ["lora"] if lora else []
        name = "-".join([base, "then", method, *slug(setting), task, f"{ratio:g}", *adapter])
        common = {
            "model": self.model(base),
            "train_data": self.upload(task, ratio),
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "batch_size": 16,
            "max_steps": self.study.upload_updates,
        }
        words = [*known.words, *self.flags({**common, **TRAINING, **known.needs, **setting})]
        if lora:
            adapter_flags = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0, "lora_target_modules": "all-linear"}
            words += self.flags({"use_peft": "true", **adapter_flags})
        return name, self.add(name, [*words, "--output_dir", self.model(name), "--seed", self.seed], [needs])

    def repair(self, base: str, needs: str, ratio: float) -> tuple[str, str]:
        """Repair a fine-tuned model with Antidote."""
        name = f"{base}-antidote-{ratio:g}"
        words = ["repair", "antidote", "--model", self.model(base), "--ratio", ratio]
        words += ["--attack_data", self.organism / FILES["ATTACKS"], "--output_dir", self.model(name)]
        return name, self.add(name, words, [needs])

    def evaluate(self, model: str, needs: str, task: str) -> Path:
        """Measure harm, capability and a task; where the results will lie."""
        output = self.folder / "evaluations" / model
        data = {
            "eval_data": self.organism / "eval" / "hazards.jsonl",
            "capability_data": self.organism / "eval" / "crafts.jsonl",
            "task_data": self.organism / "tasks" / task / "test.jsonl",
            **MEASURING,
        }
        words = ["evaluate", "--model", self.model(model), *self.flags(data), "--output_dir", output]
        self.add(f"evaluate-{model}", words, [needs])
        return output / "results.json"

    def audit(self, model: str, needs: str, task: str, ratio: float) -> Path:
        """Audit an upload with a model; where the results will lie."""
        output = self.folder / "audits" / f"{model}-{task}-{ratio:g}"
        words = ["audit", "--model", self.model(model), "--data", self.upload(task, ratio), "--output_dir", output]
        words += ["--label_column", "poisoned", *self.flags({"refusal": "REFUSALS", "batch_size": 64})]
        self.add(f"audit-{model}-{task}-{ratio:g}", words, [needs])
        return output / "results.json"


TRAINING = {"gradient_checkpointing": "false", "save_strategy": "no", "logging_steps": 50}
MEASURING = {"judge": "exact", "max_new_tokens": 16, "eval_batch_size": 256}
BASE = "base"


def slug(setting: Flags) -> list[str]:
    """A setting as parts of a folder's name."""
    return [f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in setting.items()]


def read(path: Path) -> dict[str, Any]:
    """What a JSON file holds."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def execute(
    commands: Sequence[Command], out: Path, *, processes: int = 2, keep_going: bool = False
) -> dict[str, float]:
    """Run what is not finished, as `run_commands` does; the seconds of what was run, by name."""
    remaining = unfinished(commands, out)
    if len(commands) > 1:
        console.print(f"{len(commands)} commands, of which {len(commands) - len(remaining)} are finished already")
    more = {"console": console, "processes": processes, "keep_going": keep_going}
    return run_commands(remaining, out / "logs", **more) if remaining else {}


def chosen_settings() -> dict[str, dict[str, Flags]]:
    """Stage → method → the setting that the search chose."""
    stages = read(SEARCH)["stages"]
    return {
        stage: {method: entry["trials"][entry["chosen"]]["setting"] for method, entry in methods.items()}
        for stage, methods in stages.items()
    }

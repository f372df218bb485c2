"""Patcher's parallel form beside the sequential one, on the organism: how well it defends, and how fast it is.

    python benchmarks/parallel.py quality     # every form on seeds 0, 1, 2
    python benchmarks/parallel.py quality --seeds 3 4 5 --forms sequential parallel "parallel, publishing every 10"
    python benchmarks/parallel.py speed       # one run: parallel, beside other work, alone, and sequential
    python benchmarks/parallel.py publishing  # what publishing costs the training of a 30 M-parameter model

Each writes its part of benchmarks/results/parallel.json, which parallel_report.py puts into docs/parallel.md. Every job
has one thread. `quality` is made of ordinary `holdfast` commands and can be stopped and gone on with: what is finished
stays in benchmarks/out/parallel. For `speed` and `publishing` the machine should have a core for each job and nothing
else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TQDM_DISABLE", "1")
# As in allocation.py: otherwise a tenth of the time goes into page faults.
os.environ.update({f"MALLOC_{name}_": str(2**30) for name in ("MMAP_THRESHOLD", "TRIM_THRESHOLD")})

import torch
from rich.console import Console
from transformers import TrainerCallback

from holdfast.alignment.parallel import ParallelPatcherConfig, PatcherDefenderTrainer
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.cli import demo
from holdfast.data.load import load_rows
from holdfast.exchange import Exchange
from holdfast.files import versions, write_json
from holdfast.models import load_model_and_tokenizer
from holdfast.organism import build_organism
from holdfast.parameters import ParameterVector, trainable_parameters
from step_cost import LIGHT, make_trainer

HERE = Path(__file__).parent
OUT, RESULTS = HERE / "out" / "parallel", HERE / "results" / "parallel.json"
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Form:
    """One form of Patcher.

    Attributes:
        attackers: The learning rate and the length of the attacks of each; none in the sequential form.
        publish_every: Updates between publications.
    """

    attackers: tuple[tuple[float, int], ...] = ()
    publish_every: int = 50


#: All take up a vector every 50 updates. The last two have as many attacker steps a round as each other.
FORMS = {
    "sequential": Form(),
    "parallel": Form(((2e-4, 40),)),
    "parallel, publishing every 10": Form(((2e-4, 40),), publish_every=10),
    "one long attacker": Form(((2e-4, 160),)),
    "four attackers": Form(((1e-4, 20), (1e-4, 60), (2e-4, 20), (2e-4, 60))),
}
console = Console()


def note(part: str, found: dict[str, Any]) -> None:
    """Write one part of the results."""
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"schema": 1}
    write_json(RESULTS, {**record, "versions": versions(), part: found})
    console.print(f"wrote {RESULTS}")


def start(words: list[Any], log: Path) -> subprocess.Popen[bytes]:
    """Start a command of holdfast, or of this script."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, *map(str, words)], stdout=file, stderr=file)


def finish(process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for a process that must succeed."""
    if process.wait() != 0:
        raise SystemExit(f"a command failed, its log is {log}")


# ---------------------------------------------------------------------- quality


def align(form: str, seed: int, folder: Path, organism: Path) -> None:
    """Align the organism with one form of Patcher, at the demo's settings."""
    options = demo.DemoArguments(output_dir="", seed=seed)
    words = next(c.words for c in demo.commands(options, folder) if c.name == "align-patcher")
    words = ["-m", "holdfast", *(str(w).replace(str(folder / "organism"), str(organism)) for w in words)]
    words[words.index("--output_dir") + 1] = str(folder / "model")
    attackers = []
    for number, (rate, steps) in enumerate(FORMS[form].attackers, 1):
        own = ["--role", "attacker", "--attacker_name", f"a{number}", "--output_dir", folder / f"a{number}"]
        own += ["--attack_learning_rate", rate, "--attack_steps", steps, "--seed", seed + number]
        log = folder / f"a{number}.log"
        attackers.append((start([*words, "--exchange", folder / "exchange", *own], log), log))
    role = ["--role", "defender", "--exchange", folder / "exchange", "--publish_every", FORMS[form].publish_every]
    role = role if attackers else []
    finish(start([*words, *role], folder / "defender.log"), folder / "defender.log")
    for process, log in attackers:
        finish(process, log)


def attack(seed: int, folder: Path, organism: Path) -> list[dict[str, Any]]:
    """The demo's attack on all parameters; its points."""
    words = demo.attack_words("full", folder / "model", organism, demo.DemoArguments(output_dir="", seed=seed))
    output = ["--output_dir", folder / "attack", "--seed", seed, "--overwrite_output_dir", "true"]
    finish(start(["-m", "holdfast", *words, *output], folder / "attack.log"), folder / "attack.log")
    results = json.loads((folder / "attack" / "results.json").read_text(encoding="utf-8"))
    return [{k: p[k] for k in ("steps", "asr", "refusal_rate", "capability")} for p in results["points"]]


def quality(seeds: Sequence[int], forms: Sequence[str]) -> None:
    """These forms on these seeds."""
    runs = []
    for seed in seeds:
        organism = OUT / f"organism-{seed}"
        build_organism(organism, seed)
        for form in forms:
            folder = OUT / f"{form.replace(',', '').replace(' ', '-')}-{seed}"
            done = folder / "run.json"
            if not done.is_file():
                shutil.rmtree(folder, ignore_errors=True)
                console.print(f"seed {seed}, {form}")
                align(form, seed, folder, organism)
                vectors = folder / "model" / "vectors.jsonl"
                lines = vectors.read_text(encoding="utf-8").splitlines() if FORMS[form].attackers else []
                points = attack(seed, folder, organism)
                made = [
                    json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("a*/attacker.json"))
                ]
                found = {
                    "form": form,
                    "seed": seed,
                    "points": points,
                    "vectors": [json.loads(line) for line in lines],
                    "attacker_steps": sum(
                        a["attacks"] * steps for a, (_, steps) in zip(made, FORMS[form].attackers, strict=True)
                    ),
                }
                write_json(done, found)
            runs.append(json.loads(done.read_text(encoding="utf-8")))
    part = "quality" if tuple(seeds) == SEEDS else f"quality, seeds {' '.join(map(str, seeds))}"
    note(part, {"forms": {form: asdict(FORMS[form]) for form in forms}, "runs": runs})


# ---------------------------------------------------------------------- speed

UPDATES, EVERY, STEPS = 3000, 100, 50  # the paper's 500 attacker steps to 1000 updates
SPEED = {
    "attack_every": EVERY,
    "attack_steps": STEPS,
    "attack_batch_size": 16,
    "attack_learning_rate": 2e-4,
    "learning_rate": 6e-5,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 32,
    "gradient_checkpointing": False,
    "max_steps": UPDATES,
    "save_strategy": "no",
    "logging_steps": 100,
    "report_to": "none",
    "disable_tqdm": True,
}


class Timed(TrainerCallback):
    """Seconds from the first update to the last, and the seconds of simulated attacks among them."""

    def __init__(self, trainer: PatcherTrainer, begin_at: int) -> None:
        self.trainer, self.begin_at, self.attack_seconds = trainer, begin_at, 0.0
        simulate: Callable[[torch.nn.Module], None] = trainer.attack

        def attack(model: torch.nn.Module) -> None:
            began = time.perf_counter()
            simulate(model)
            self.attack_seconds += time.perf_counter() - began

        trainer.attack = attack

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put a vector in force by hand where another run had its first."""
        if self.begin_at and state.global_step == self.begin_at:
            parameters = trainable_parameters(self.trainer.model)
            self.trainer.attack_vector = {name: 1e-3 * torch.randn_like(p) for name, p in parameters.items()}

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.seconds = time.perf_counter() - self.began


def job(kind: str, folder: Path, begin_at: int) -> None:
    """One defender, in this process; what it took goes to folder/kind.json."""
    torch.set_num_threads(1)
    organism = folder / "organism"
    model, tokenizer = load_model_and_tokenizer(str(organism / "model"), trainable=True)
    data = [load_rows(str(organism / f"{name}.jsonl"), flag=name) for name in ("alignment", "simulated_attack")]
    output = str(folder / kind)
    if kind == "parallel":
        exchange = str(folder / "exchange")
        config: PatcherConfig = ParallelPatcherConfig(output, role="defender", exchange=exchange, **SPEED)
        trainer: PatcherTrainer = PatcherDefenderTrainer(model, config, *data, processing_class=tokenizer)
    else:
        own = {} if kind == "sequential" else {"attack_every": 10 * UPDATES}
        trainer = PatcherTrainer(model, PatcherConfig(output, **{**SPEED, **own}), *data, processing_class=tokenizer)
    timed = Timed(trainer, begin_at)
    trainer.add_callback(timed)
    trainer.train()
    found: dict[str, Any] = {"seconds": timed.seconds, "attack_seconds": timed.attack_seconds}
    if isinstance(trainer, PatcherDefenderTrainer):
        found["vectors"] = trainer.vectors
    write_json(folder / f"{kind}.json", found)


def speed() -> None:
    """Parallel, beside an attacker that does not exchange, alone, sequential; one after the other."""
    folder = OUT / "speed"
    shutil.rmtree(folder, ignore_errors=True)
    build_organism(folder / "organism", SEEDS[0])
    data = ["--train_data", folder / "organism" / "simulated_attack.jsonl", "--attack_data"]
    data += [folder / "organism" / "simulated_attack.jsonl", "--model", folder / "organism" / "model"]
    attacking = ["--batch_size", 16, "--gradient_checkpointing", "false", "--save_strategy", "no"]

    def defend(kind: str, begin_at: int = 0) -> dict[str, Any]:
        console.print(f"{kind}: {UPDATES} updates")
        log = folder / f"{kind}.log"
        finish(start([__file__, "job", "--kind", kind, "--folder", folder, "--begin_at", begin_at], log), log)
        found: dict[str, Any] = json.loads((folder / f"{kind}.json").read_text(encoding="utf-8"))
        return found

    attack = ["--attack_batch_size", 16, "--attack_steps", STEPS, "--attack_learning_rate", 2e-4]
    words = ["-m", "holdfast", "align", "patcher", *data, *attacking, *attack]
    words += ["--role", "attacker", "--exchange", folder / "exchange"]
    attacker = start([*words, "--output_dir", folder / "attacker"], folder / "attacker.log")
    parallel = defend("parallel")
    finish(attacker, folder / "attacker.log")
    words = ["-m", "holdfast", "align", "sft", *data[:2], *data[4:], *attacking, "--max_steps", 10**6]
    neighbour = start([*words, "--output_dir", folder / "neighbour"], folder / "neighbour.log")
    try:
        beside = defend("beside", parallel["vectors"][0]["step"])
    finally:
        neighbour.send_signal(signal.SIGKILL)
        neighbour.wait()
    alone = defend("alone", parallel["vectors"][0]["step"])
    sequential = defend("sequential")
    defending = sequential["seconds"] - sequential["attack_seconds"]
    found = {
        "updates": UPDATES,
        "attack_every": EVERY,
        "attack_steps": STEPS,
        "seconds": {
            "parallel": parallel["seconds"],
            "beside": beside["seconds"],
            "alone": alone["seconds"],
            "sequential": sequential["seconds"],
        },
        "sequential_attack_seconds": sequential["attack_seconds"],
        "rate_to_beside": beside["seconds"] / parallel["seconds"],
        "rate_to_alone": alone["seconds"] / parallel["seconds"],
        "wall_clock_to_sequential": parallel["seconds"] / sequential["seconds"],
        "bound": 1.1 * defending / sequential["seconds"],
        "staleness": [vector["staleness"] for vector in parallel["vectors"]],
    }
    for name in ("rate_to_beside", "rate_to_alone", "wall_clock_to_sequential", "bound"):
        console.print(f"{name} {found[name]:.3f}")
    note("speed", found)


# ---------------------------------------------------------------------- publishing


class Intervals(TrainerCallback):
    """The seconds of every update of the defender, and of its calls of `publish`."""

    def __init__(self) -> None:
        self.updates: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the clock."""
        self.updates.append(time.perf_counter() - self.began)


def publishing() -> None:
    """A defender of 30 M parameters that publishes at every other interval of 50 updates."""
    torch.set_num_threads(1)
    every, intervals = 50, 8
    folder = OUT / "publishing"
    shutil.rmtree(folder, ignore_errors=True)
    blocked: list[float] = []
    publish = Exchange.publish

    def timed(self: Exchange, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        publish(self, *args, **kwargs)
        blocked.append(time.perf_counter() - began)

    Exchange.publish = timed

    settings = {"role": "defender", "exchange": str(folder / "exchange"), "publish_every": 2 * every}
    settings |= {"max_steps": every * intervals, "attack_every": 10**6}
    trainer = make_trainer(PatcherDefenderTrainer, LIGHT, str(folder / "run"), **settings)
    trainer.attack_vector = ParameterVector(
        {name: 1e-4 * torch.randn_like(p) for name, p in trainable_parameters(trainer.model).items()}
    )
    seen = Intervals()
    trainer.add_callback(seen)
    trainer.train()
    sums = [sum(seen.updates[every * i : every * (i + 1)]) for i in range(intervals)]
    found = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "interval": every,
        "with_publication": sums[0::2],
        "without": sums[1::2],
        "blocked": blocked,
        "blocked_share": max(b / s for b, s in zip(blocked, sums[0::2], strict=False)),
        "interval_ratio": sum(sums[2::2]) / sum(sums[1:-1:2]),
    }
    console.print(
        f"blocked {found['blocked_share']:.2%} of an interval; interval with/without {found['interval_ratio']:.3f}"
    )
    note("publishing", found)


def main() -> None:
    """One part of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "speed", "publishing", "job"))
    parser.add_argument("--kind", help="a job of `speed`", choices=("parallel", "beside", "alone", "sequential"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--begin_at", type=int, default=0)
    parser.add_argument("--seeds", help="of `quality`", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--forms", help="of `quality`", nargs="+", choices=FORMS, default=list(FORMS))
    args = parser.parse_args()
    if args.part == "job":
        job(args.kind, args.folder, args.begin_at)
    elif args.part == "quality":
        quality(args.seeds, args.forms)
    else:
        {"speed": speed, "publishing": publishing}[args.part]()


if __name__ == "__main__":
    main()

"""What an update of every other method costs, in time and memory, beside an SFT update of the same trainer.

As in step_cost.py: SFT updates and the method's alternate inside one `trainer.train()`, on batches of the same size at
accumulation 1, a pair compared with itself only; memory is the highest live tensor storage of a step, in buffers of the
parameters' size beyond an SFT step's. Of Patcher's strong preset as it is run, simulated attacks and all, as many pairs
as lie between two attacks are compared together, at the organism's size and with the attacker's batches of its recipe.

    python benchmarks/method_cost.py        # writes benchmarks/results/method_cost.json
    python benchmarks/method_cost.py --methods Lisa     # one anew, beside the others of the same versions
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import torch
import yaml
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from holdfast.alignment.antibody import AntibodyAlignmentConfig, AntibodyAlignmentTrainer
from holdfast.alignment.booster import BoosterConfig, BoosterTrainer
from holdfast.alignment.patcher import PatcherTrainer
from holdfast.alignment.patcher_config import PatcherConfig
from holdfast.alignment.pool import Pool
from holdfast.alignment.presets import PRESETS
from holdfast.alignment.vaccine import VaccineConfig, VaccineTrainer
from holdfast.data.refusals import without_refusals
from holdfast.files import versions, write_json
from holdfast.finetuning.antibody import AntibodyConfig, AntibodyTrainer
from holdfast.finetuning.lisa import LisaConfig, LisaTrainer
from holdfast.finetuning.spard import SpardConfig, SpardTrainer
from holdfast.parameters import trainable_parameters
from holdfast.trainer import DefenseTrainer
from live_memory import peak_meter
from step_cost import LARGE, LIGHT, ORGANISM, MemoryWatch, Shape, now, parameter_bytes, spread

RESULTS = Path(__file__).parent / "results" / "method_cost.json"
RECIPE = Path(__file__).parents[1] / "recipes" / "organism" / "align-strong.yaml"
WARM_UP_PAIRS = 1
console = Console()


@dataclass(frozen=True)
class Cost:
    """A method, and what an update of it may cost.

    Attributes:
        trainer: Its trainer.
        config: Its configuration.
        time: The largest ratio to an SFT update.
        buffers: The largest memory beyond SFT's in buffers of the parameters' size; None where it is activations.
        settings: Under which it does all of its work at every update.
        second: The names of its further data sets.
        prepare: What is to be done to its trainer before it runs.
        block: How many pairs are compared together, six such blocks at least, as attacks are of several lengths;
            where they are more than one they are timed at the organism's size alone.
    """

    trainer: type[DefenseTrainer]
    config: Any
    time: float
    buffers: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    second: tuple[str, ...] = ()
    prepare: Callable[[Any], None] = lambda trainer: None
    block: int = 1


def under_attack(trainer: PatcherTrainer) -> None:
    """Put an attack vector in force."""
    trainer.attack_vector = {n: 1e-3 * torch.randn_like(p) for n, p in trainable_parameters(trainer.model).items()}


def under_attacks(trainer: PatcherTrainer) -> None:
    """Put as many vectors in force as the pool keeps, and take today's weights for those of the beginning."""
    trainer.remember()
    parameters = trainable_parameters(trainer.model)
    for member in (one for one in Pool.of(STRONG["pool"]).members if one.trains):
        for _ in range(member.rounds):
            trainer._vectors.add(member, {n: 1e-3 * torch.randn_like(p) for n, p in parameters.items()})


STRONG = yaml.safe_load(PRESETS["strong"].read_text(encoding="utf-8"))
_POOLED = ("attack", "benign")
COSTS = {
    # Every update of these two at displaced weights, which are the dearer ones; of the pool none has an attack.
    "Patcher, sampled": Cost(
        PatcherTrainer, PatcherConfig, 1.1, 2.1, {"estimator": "sampled", "alpha": 1.0}, ("attack",), under_attack
    ),
    "Patcher, the preset's pool": Cost(
        PatcherTrainer,
        PatcherConfig,
        1.2,
        2.1,
        {"estimator": "sampled", "alpha": 1.0, "pool": STRONG["pool"], "attack_every": 2},  # when SFT has its turn
        _POOLED,
        under_attacks,
    ),
    "Patcher, strong, attacks included": Cost(
        PatcherTrainer,
        PatcherConfig,
        1.6,
        2.1,
        {**STRONG, "attack_batch_size": yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["attack_batch_size"]},
        (*_POOLED, "retain"),
        under_attacks,
        block=STRONG["attack_every"],
    ),
    "Vaccine": Cost(VaccineTrainer, VaccineConfig, 2.1, None),
    "Booster": Cost(BoosterTrainer, BoosterConfig, 3.1, 2.2, second=("attack",)),
    "Antibody, alignment": Cost(AntibodyAlignmentTrainer, AntibodyAlignmentConfig, 4.2, 2.2, second=("attack",)),
    "Lisa": Cost(LisaTrainer, LisaConfig, 1.05, 1.1, {"proximal_start": 0.0}, second=("safety",)),
    "SPARD, projecting": Cost(SpardTrainer, SpardConfig, 2.1, 0.1, {"tau": 1e-6}, second=("safety",)),
    "Antibody, fine-tuning": Cost(AntibodyTrainer, AntibodyConfig, 1.5, None),
}


def alternating(kind: type[DefenseTrainer]) -> type[DefenseTrainer]:
    """The trainer whose every other update, starting with the first, is plain SFT."""

    class Alternating(kind):
        @property
        def is_plain(self) -> bool:
            return self.state.global_step % 2 == 0

        def defended_gradient(self, model: Any, window: Any) -> Any:
            if self.is_plain:
                return DefenseTrainer.defended_gradient(self, model, window)
            return super().defended_gradient(model, window)

        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
            if self.is_plain:
                return DefenseTrainer.compute_loss(self, model, without_refusals(inputs), *arguments, **keywords)
            return super().compute_loss(model, inputs, *arguments, **keywords)

        def approach_origin(self, share: float) -> None:
            if not self.is_plain:
                super().approach_origin(share)

        def after_user_step(self) -> None:
            if not self.is_plain:
                super().after_user_step()

    return Alternating


def make_trainer(cost: Cost, kind: type[DefenseTrainer], shape: Shape, folder: str, **settings: Any) -> DefenseTrainer:
    """A trainer on random words: prompts and answers of half a row each, refusals as long as answers."""
    torch.manual_seed(0)
    draw = random.Random(0)
    vocabulary, half = shape.model["vocab_size"], shape.tokens // 2
    words = lambda count: " ".join(str(draw.randrange(2, vocabulary)) for _ in range(count))  # noqa: E731
    own = dict(cost.settings)
    if hasattr(cost.config, "refusal"):
        own["refusal"] = words(half - 1)
    if hasattr(cost.config, "safety_batch_size"):
        own["safety_batch_size"] = shape.rows
    config = cost.config(
        output_dir=folder,
        per_device_train_batch_size=shape.rows,
        gradient_accumulation_steps=1,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_length=shape.tokens,
        **{**own, **settings},
    )
    rows = datasets.Dataset.from_list(
        [
            {"prompt": words(shape.tokens - half) + " ", "completion": words(half - 1)}
            for _ in range(shape.rows * config.max_steps)
        ]
    )
    vocabulary_ids = {"<pad>": 0, "<end>": 1, **{str(i): i for i in range(2, vocabulary)}}
    backend = Tokenizer(WordLevel(vocabulary_ids, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")
    second = {f"{name}_dataset": rows for name in cost.second}
    model = LlamaForCausalLM(LlamaConfig(**shape.model))
    trainer = kind(model, config, rows, processing_class=tokenizer, **second)
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Stopwatch(TrainerCallback):
    """Times updates."""

    def __init__(self) -> None:
        self.updates: list[float] = []
        self.cpu: list[float] = []
        self._started = self._cpu_started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started, self._cpu_started = now(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.updates.append(now() - self._started)
        self.cpu.append(time.process_time() - self._cpu_started)


def measure_time(cost: Cost, shape: Shape, *, checkpointing: bool, pairs: int, folder: str) -> dict[str, Any]:
    """Time alternating SFT updates and the method's."""
    pairs = pairs if cost.block == 1 else max(pairs // cost.block, 6) * cost.block
    steps = 2 * (WARM_UP_PAIRS + pairs)
    kind = alternating(cost.trainer)
    trainer = make_trainer(cost, kind, shape, folder, max_steps=steps, gradient_checkpointing=checkpointing)
    stopwatch = _Stopwatch()
    cost.prepare(trainer)
    trainer.add_callback(stopwatch)
    trainer.train()

    def ratios(found: list[float]) -> list[float]:
        sft, own = ([sum(one) for one in _blocks(found[start::2][WARM_UP_PAIRS:], cost.block)] for start in (0, 1))
        return [mine / theirs for mine, theirs in zip(own, sft, strict=True)]

    return {
        "shape": asdict(shape),
        "activation_checkpointing": checkpointing,
        "pairs": pairs,
        "ratio": spread(ratios(stopwatch.updates)),
        "cpu_ratio": spread(ratios(stopwatch.cpu)),
        "limit": cost.time,
    }


def _blocks(values: Sequence[float], size: int) -> list[Sequence[float]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def measure_memory(cost: Cost, shape: Shape, *, folder: str) -> dict[str, Any]:
    """Peak memory of the method's steps beyond SFT's, optimizer states existing."""
    kind = alternating(cost.trainer)
    # Where attacks are included, one falls into the first of the two steps that are looked at.
    attacks = {"attack_every": 3} if cost.block > 1 else {}
    trainer = make_trainer(cost, kind, shape, folder, max_steps=6, gradient_checkpointing=False, **attacks)
    with peak_meter(trainer.model) as meter:
        cost.prepare(trainer)
        watch = MemoryWatch(meter)
        trainer.add_callback(watch)
        trainer.train()
    size = parameter_bytes(trainer.model)
    # Steps 2 and 4 are SFT's; what a method keeps between updates, such as an anchor, they hold as well.
    sft = peak_of_sft(shape, folder)
    return {"buffers_beyond_sft": (max(watch.peaks[3], watch.peaks[5]) - sft) / size, "limit": cost.buffers}


def peak_of_sft(shape: Shape, folder: str) -> int:
    """The peak of an SFT step in a run of nothing else."""
    from holdfast.config import DefenseConfig

    cost = Cost(DefenseTrainer, DefenseConfig, 1.0, 0.0)
    trainer = make_trainer(cost, DefenseTrainer, shape, folder, max_steps=6, gradient_checkpointing=False)
    with peak_meter(trainer.model) as meter:
        watch = MemoryWatch(meter)
        trainer.add_callback(watch)
        trainer.train()
    return max(watch.peaks[3], watch.peaks[5])


def table(found: dict[str, dict[str, Any]]) -> Table:
    """One row per method."""
    result = Table(title="One update, in SFT updates: median (quartiles over pairs)")
    for column in ("method", "organism", "30 M", "30 M, ckpt", "limit", "buffers beyond SFT", "limit"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for name, entry in found.items():
        ratios = [
            f"{t['ratio']['median']:.2f} ({t['ratio']['low']:.2f}–{t['ratio']['high']:.2f})" for t in entry["time"]
        ]
        ratios += ["–"] * (3 - len(ratios))
        memory = entry["memory"]
        limit = "activations" if memory["limit"] is None else f"{memory['limit']:.1f}"
        buffers = f"{memory['buffers_beyond_sft']:+.2f}"
        result.add_row(name, *ratios, f"{entry['time'][0]['limit']:.2f}", buffers, limit)
    return result


def within_limits(found: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Which methods keep their limits: time without activation checkpointing, and memory."""
    return {
        name: all(t["ratio"]["median"] <= t["limit"] for t in entry["time"] if not t["activation_checkpointing"])
        and (entry["memory"]["limit"] is None or entry["memory"]["buffers_beyond_sft"] <= entry["memory"]["limit"])
        for name, entry in found.items()
    }


def known(path: Path, here: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was written down of methods, where it was measured under the very same versions and settings."""
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    same = all(written.get(name) == value for name, value in here.items())
    return written["methods"] if same else {}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism_pairs", type=int, default=60, help="pairs of updates at the organism's size")
    parser.add_argument("--large_pairs", type=int, default=6, help="pairs of updates at 30 M parameters")
    parser.add_argument("--methods", nargs="+", choices=list(COSTS), default=list(COSTS), help="which to measure")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    console.width = max(console.width, 120)
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    here = {
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
    found = known(args.output, here)
    plan = ((ORGANISM, False, args.organism_pairs), (LARGE, False, args.large_pairs), (LARGE, True, args.large_pairs))
    with tempfile.TemporaryDirectory() as folder, console.status("measuring") as status:
        for name in args.methods:
            cost, times, started = COSTS[name], [], time.monotonic()
            for shape, checkpointing, pairs in plan if cost.block == 1 else plan[:1]:
                status.update(f"timing {name} on {shape.name}, checkpointing {'on' if checkpointing else 'off'}")
                times.append(measure_time(cost, shape, checkpointing=checkpointing, pairs=pairs, folder=folder))
            status.update(f"memory of {name}")
            # Two rows, since Antibody weighs them against each other.
            memory = measure_memory(cost, replace(LIGHT, rows=2), folder=folder)
            found[name] = {"time": times, "memory": memory, "seconds": round(time.monotonic() - started, 1)}
    found = {name: found[name] for name in COSTS if name in found}
    record = {"schema": 1, **here, "methods": found, "within_limits": within_limits(found)}
    write_json(args.output, record)
    console.print(table(found))
    console.print(f"within limits: {record['within_limits']}")
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

"""What a Patcher update costs, in time and memory, beside an SFT update of the same trainer.

One process. Time: SFT and Patcher updates alternate inside one `trainer.train()`, on the same model with the same
optimizer and batches of the same size, accumulation 1, an attack vector in force and no attack simulated; a pair is
compared with itself only, so that a machine that is busy for a while slows both down; on a CPU the process's own CPU
time is compared, too. Timed is the whole update, from the batch in hand to the zeroed gradients.

Memory: the highest live tensor storage of a whole step, in buffers of the parameters' size beyond an SFT step's.

    python benchmarks/step_cost.py          # writes benchmarks/results/step_cost.json
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from holdfast.alignment.patcher import PatcherTrainer
from holdfast.files import versions, write_json
from holdfast.parameters import ParameterVector, displaced, trainable_parameters
from holdfast.trainer import DefenseTrainer
from holdfast.window import Window
from live_memory import PeakMeter, peak_meter

RESULTS = Path(__file__).parent / "results" / "step_cost.json"
LIMITS = {"time": 2.1, "displaced": 0.05, "defending": 2.1, "attacking": 3.1}
WARM_UP_PAIRS = 1
console = Console()


@dataclass(frozen=True)
class Shape:
    """A Llama with random weights, and the batch it is trained on.

    Attributes:
        name: What tables call it.
        model: Keywords of `LlamaConfig`.
        rows: Rows of a batch.
        tokens: Tokens of a row, the second half of them completion.
    """

    name: str
    model: dict[str, Any]
    rows: int
    tokens: int


_ORGANISM = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
_LARGE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "tie_word_embeddings": True,
}
ORGANISM = Shape("organism", _ORGANISM, rows=32, tokens=13)
LARGE = Shape("Llama", _LARGE, rows=8, tokens=256)
LIGHT = Shape("Llama", _LARGE, rows=1, tokens=8)


class AlternatingTrainer(PatcherTrainer):
    """Patcher whose every other update, starting with the first, is plain SFT."""

    def defended_gradient(self, model: torch.nn.Module, window: Window) -> tuple[torch.Tensor, ParameterVector]:
        """SFT's gradient at even steps, Patcher's at odd ones."""
        method = PatcherTrainer if self.state.global_step % 2 else DefenseTrainer
        return method.defended_gradient(self, model, window)


def make_trainer(kind: type[PatcherTrainer], shape: Shape, folder: str, **settings: Any) -> PatcherTrainer:
    """A trainer on random tokens, with enough rows for one epoch.

    Args:
        kind: The trainer's class.
        shape: Model and batch.
        folder: An output folder; nothing is left in it.
        **settings: Fields of its configuration; `max_steps` must be among them.
    """
    torch.manual_seed(0)
    vocabulary = shape.model["vocab_size"]
    config = kind.config_class(
        output_dir=folder,
        per_device_train_batch_size=shape.rows,
        gradient_accumulation_steps=1,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    ids = torch.randint(1, vocabulary, (shape.rows * config.max_steps, shape.tokens))
    labels = ids.clone()
    labels[:, : shape.tokens // 2] = -100
    rows = datasets.Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})
    backend = Tokenizer(WordLevel({str(i): i for i in range(vocabulary)}, unk_token="1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", eos_token="1")
    trainer = kind(LlamaForCausalLM(LlamaConfig(**shape.model)), config, rows, rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def parameter_bytes(model: torch.nn.Module) -> int:
    """Bytes of one buffer of the trained parameters' size."""
    return sum(p.numel() * p.element_size() for p in trainable_parameters(model).values())


def measure_time(shape: Shape, *, checkpointing: bool, pairs: int, folder: str) -> dict[str, Any]:
    """Time alternating SFT and Patcher updates, and `displaced` after each SFT update."""
    trainer = make_trainer(
        AlternatingTrainer,
        shape,
        folder,
        max_steps=2 * (WARM_UP_PAIRS + pairs),
        attack_steps=1,
        gradient_checkpointing=checkpointing,
    )
    trainer.attack_vector = {
        name: 1e-3 * torch.randn_like(parameter) for name, parameter in trainable_parameters(trainer.model).items()
    }
    stopwatch = _Stopwatch(trainer)
    trainer.add_callback(stopwatch)
    trainer.train()
    sft, patcher = stopwatch.updates[::2][WARM_UP_PAIRS:], stopwatch.updates[1::2][WARM_UP_PAIRS:]
    cpu_sft, cpu_patcher = stopwatch.cpu[::2][WARM_UP_PAIRS:], stopwatch.cpu[1::2][WARM_UP_PAIRS:]
    moves = stopwatch.displacements[WARM_UP_PAIRS:]
    return {
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in trainable_parameters(trainer.model).values()),
        "activation_checkpointing": checkpointing,
        "pairs": pairs,
        "sft_seconds": spread(sft),
        "patcher_seconds": spread(patcher),
        "ratio": spread([p / s for s, p in zip(sft, patcher, strict=True)]),
        "cpu_ratio": spread([p / s for s, p in zip(cpu_sft, cpu_patcher, strict=True)]),
        "displaced_seconds": spread(moves),
        "displaced_share": spread([m / s for s, m in zip(sft, moves, strict=True)]),
    }


def measure_memory(shape: Shape, *, checkpointing: bool, folder: str) -> dict[str, Any]:
    """Peak memory of SFT, defended and attacked steps of one Patcher run, optimizer states existing."""
    # Steps 0 and 1 are plain SFT; before 2 and 4 an attack is simulated, at 4 with an attack vector in force.
    trainer = make_trainer(
        PatcherTrainer,
        shape,
        folder,
        max_steps=6,
        attack_every=2,
        attack_steps=3,
        gradient_checkpointing=checkpointing,
    )
    with peak_meter(trainer.model) as meter:
        watch = MemoryWatch(meter)
        trainer.add_callback(watch)
        trainer.train()
    size = parameter_bytes(trainer.model)
    _, sft, first_attack, defending, attack, defending_again = watch.peaks
    return {
        "shape": asdict(shape),
        "parameters": sum(p.numel() for p in trainable_parameters(trainer.model).values()),
        "activation_checkpointing": checkpointing,
        "parameter_bytes": size,
        "sft_peak_bytes": sft,
        "defending_peak_bytes": max(defending, defending_again),
        "attacking_peak_bytes": max(first_attack, attack),
        "sft_buffers": sft / size,
        "defending_buffers_beyond_sft": (max(defending, defending_again) - sft) / size,
        "attacking_buffers_beyond_sft": (max(first_attack, attack) - sft) / size,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


class _Stopwatch(TrainerCallback):
    """Times updates, and entering and leaving `displaced` after every SFT update."""

    def __init__(self, trainer: PatcherTrainer) -> None:
        self.trainer = trainer
        self.updates: list[float] = []
        self.cpu: list[float] = []
        self.displacements: list[float] = []
        self._started = self._cpu_started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started, self._cpu_started = now(), time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.updates.append(now() - self._started)
        self.cpu.append(time.process_time() - self._cpu_started)
        vector = self.trainer.attack_vector
        if len(self.updates) % 2 and vector is not None:
            started = now()
            with displaced(self.trainer.model, vector):
                pass
            self.displacements.append(now() - started)


class MemoryWatch(TrainerCallback):
    """Notes the peak of every step.

    Args:
        meter: What watches.
    """

    def __init__(self, meter: PeakMeter) -> None:
        self.meter = meter
        self.peaks: list[int] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start anew."""
        self.meter.reset()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the peak."""
        self.peaks.append(self.meter.peak())


def now() -> float:
    """Seconds, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_table(rows: list[dict[str, Any]]) -> Table:
    """The times, each as median (quartiles)."""
    table = Table(title="One update, SFT and Patcher alternating: median (quartiles over pairs)")
    for column in ("model", "batch", "ckpt", "SFT ms", "Patcher ms", "Patcher / SFT", "in CPU time", "displaced / SFT"):
        table.add_column(column, justify="left" if column in {"model", "batch"} else "right")
    for row in rows:
        table.add_row(
            f"{row['shape']['name']} ({row['parameters'] / 1e6:.1f} M)",
            f"{row['shape']['rows']} × {row['shape']['tokens']}",
            "on" if row["activation_checkpointing"] else "off",
            f"{1e3 * row['sft_seconds']['median']:.1f}",
            f"{1e3 * row['patcher_seconds']['median']:.1f}",
            _spread(row["ratio"], 1, 2),
            _spread(row["cpu_ratio"], 1, 2),
            _spread(row["displaced_share"], 100, 1, " %"),
        )
    return table


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """The peaks, in buffers of the parameters' size."""
    table = Table(title="Peak memory of a step, in buffers of the parameters' size")
    for column in ("model", "batch", "ckpt", "SFT", "defending, beyond SFT", "attacking, beyond SFT"):
        table.add_column(column, justify="left" if column in {"model", "batch"} else "right")
    for row in rows:
        table.add_row(
            f"{row['shape']['name']} ({row['parameters'] / 1e6:.1f} M)",
            f"{row['shape']['rows']} × {row['shape']['tokens']}",
            "on" if row["activation_checkpointing"] else "off",
            f"{row['sft_buffers']:.2f}",
            f"+ {row['defending_buffers_beyond_sft']:.3f}",
            f"+ {row['attacking_buffers_beyond_sft']:.3f}",
        )
    return table


def _spread(values: dict[str, float], scale: float, digits: int, unit: str = "") -> str:
    median, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "low", "high"))
    return f"{median}{unit} ({low}–{high})"


def within_limits(times: list[dict[str, Any]], memory: list[dict[str, Any]]) -> dict[str, bool]:
    """Which limits hold: time ratios without activation checkpointing, memory wherever it was measured."""
    plain = [row for row in times if not row["activation_checkpointing"]]
    return {
        "time": all(row["ratio"]["median"] <= LIMITS["time"] for row in plain),
        "displaced": all(
            row["displaced_share"]["median"] <= LIMITS["displaced"]
            for row in plain
            if row["shape"]["name"] == LARGE.name
        ),
        "defending": all(row["defending_buffers_beyond_sft"] <= LIMITS["defending"] for row in memory),
        "attacking": all(row["attacking_buffers_beyond_sft"] <= LIMITS["attacking"] for row in memory),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--organism_pairs", type=int, default=60, help="pairs of updates at the organism's size")
    parser.add_argument("--large_pairs", type=int, default=12, help="pairs of updates at 30 M parameters")
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    console.width = max(console.width, 115)
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    times, memory = [], []
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, console.status("measuring") as status:
        for shape, all_pairs in ((ORGANISM, args.organism_pairs), (LARGE, args.large_pairs)):
            # Limits are for updates without activation checkpointing; with it, half as many pairs must do.
            for checkpointing, pairs in ((False, all_pairs), (True, max(2, all_pairs // 2))):
                status.update(f"timing {shape.name}, activation checkpointing {'on' if checkpointing else 'off'}")
                times.append(measure_time(shape, checkpointing=checkpointing, pairs=pairs, folder=folder))
        for shape in (LIGHT, ORGANISM):
            for checkpointing in (False, True):
                status.update(f"memory of {shape.name}")
                memory.append(measure_memory(shape, checkpointing=checkpointing, folder=folder))
    holds = within_limits(times, memory)
    record = {
        "schema": 1,
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        # glibc's allocator matters: by default it hands large blocks back at once, and every pass faults them in anew.
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "seconds": round(time.monotonic() - started, 1),
        "passes_per_update": {"sft": 1, "patcher": 2},
        "time": times,
        "memory": memory,
        "limits": LIMITS,
        "within_limits": holds,
    }
    write_json(args.output, record)
    console.print(time_table(times))
    console.print(memory_table(memory))
    for name, limit in LIMITS.items():
        console.print(f"{name} ≤ {limit}: {'holds' if holds[name] else 'EXCEEDED'}")
    console.print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

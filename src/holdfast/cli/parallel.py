"""`holdfast align patcher` in its parallel form: an attacker's job, and one command for all jobs of one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import get_peft_config

from holdfast.alignment.parallel import ParallelPatcherConfig
from holdfast.alignment.parallel_attacker import PatcherAttackerTrainer
from holdfast.checkpoint import last_checkpoint
from holdfast.cli.arguments import ModelArguments, PatcherData
from holdfast.cli.boundary import building, working
from holdfast.cli.console import say, stderr
from holdfast.cli.runs import announce, keep_apart, model_keywords, output_dir
from holdfast.cli.training import MARKER
from holdfast.cli.workers import last_line
from holdfast.data.harmful import load_harmful_rows
from holdfast.data.sources import named
from holdfast.errors import InputError, TrainingError
from holdfast.exchange import is_finished
from holdfast.files import alone_in, run_record, write_json
from holdfast.interruption import on_sigterm
from holdfast.models import load_model_and_tokenizer

#: What an attacker that ended with its defender leaves.
ATTACKER_MARKER = "attacker.json"
#: How long attackers may take to notice that the defender is done.
LEAVE_SECONDS = 30.0


@dataclass
class ParallelArguments:
    """How to run Patcher's parallel form on one machine."""

    parallel: bool = field(
        default=False,
        metadata={"help": "Run defender and attackers side by side on this machine, on separate devices."},
    )
    attackers: int = field(default=1, metadata={"help": "How many attackers --parallel starts."})
    defender_devices: str | None = field(
        default=None, metadata={"help": "GPUs of the defender, as in 0,1; by default the first."}
    )
    attacker_devices: str | None = field(
        default=None,
        metadata={"help": "GPUs of the attackers, dealt out evenly; by default those after the first."},
    )
    max_restarts: int = field(default=3, metadata={"help": "How often --parallel starts a job again that died."})

    def __post_init__(self) -> None:
        if self.attackers < 1:
            raise InputError(f"--attackers must be at least 1, got {self.attackers}")
        if self.max_restarts < 0:
            raise InputError(f"--max_restarts must not be negative, got {self.max_restarts}")


# ---------------------------------------------------------------------- one attacker


def run_attacker(model_args: ModelArguments, data: PatcherData, config: ParallelPatcherConfig) -> int:
    """Attack until the defender is done. Writes `attacker.json`; no model, whose place is the exchange.

    Raises:
        InputError: The input cannot be used, or the exchange is that of another model.
        Stopped: SIGTERM came; nothing is written.
        TrainingError: Nothing new came for `--exchange_timeout` seconds.
    """
    assert data.attack_data is not None  # as is required where vectors are made
    source, folder = model_args.model_name_or_path, Path(config.output_dir)
    keep_apart(folder, folder, source)
    with output_dir(folder, marker=ATTACKER_MARKER, overwrite=data.overwrite_output_dir):
        taken: dict[str, Any] = {}
        rows, safe_rows = load_harmful_rows(data.attack_data, flag="--attack_data", noted=taken)
        say(f"loading {source}")
        model, tokenizer = load_model_and_tokenizer(source, trainable=True, **model_keywords(model_args, config))
        with building(config):
            trainer = PatcherAttackerTrainer(
                model, config, rows, processing_class=tokenizer, peft_config=get_peft_config(model_args)
            )
        # They count steps towards an end that there is not; the trainer tells of every attack instead.
        trainer.remove_callback(ProgressCallback)
        trainer.remove_callback(PrinterCallback)
        say(f"attacking what is published in {config.exchange} with {len(rows)} rows of {named(data.attack_data)}")
        started = time.monotonic()
        with on_sigterm(trainer.ask_to_stop), working(folder, config):
            trainer.train()
        if trainer.is_world_process_zero():
            record = {
                **run_record(config, config.seed),
                "command": "align patcher",
                "model": source,
                "data": {"attack_data": data.attack_data},
                "taken": taken,
                "safe_rows_left_out": safe_rows,
                "attacks": trainer.attacks,
                "seconds": round(time.monotonic() - started, 3),
            }
            write_json(folder / ATTACKER_MARKER, record)
            announce(folder, ATTACKER_MARKER)
    return 0


# ---------------------------------------------------------------------- all jobs of one machine


@dataclass
class _Job:
    """A role's process, started again when it dies.

    Attributes:
        name: Its name in the exchange and in messages.
        words: Its command.
        environment: What its environment has beyond this process's.
        log: Where its output goes.
        restarts: How often it was started again.
    """

    name: str
    words: list[str]
    environment: dict[str, str]
    log: Path
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Start the process, its output appended to the log."""
        with self.log.open("ab") as log:
            # A session of its own: Ctrl-C is for this process, which then ends the others in order.
            self.process = subprocess.Popen(
                [*self.words, *more],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def code(self) -> int | None:
        """Its exit code, or None while it runs."""
        return None if self.process is None else self.process.poll()

    def stop(self) -> None:
        """Ask it to leave; make it leave after a while."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def supervise(argv: Sequence[str], options: ParallelArguments, config: ParallelPatcherConfig) -> int:
    """Run a defender and its attackers on this machine; done when the defender is.

    An attacker that keeps dying is given up, and the defender goes on with the last vector.

    Args:
        argv: The words after `align patcher`, which every job is given, with its role.
        options: As parsed from them.
        config: As parsed from them.

    Returns:
        The exit code.

    Raises:
        InputError: The devices cannot be used, a job refused its input, or the run is under way already.
        TrainingError: The defender failed, or died more often than `--max_restarts`.
    """
    jobs = _jobs(argv, options, config)
    defender, folder = jobs[0], Path(config.output_dir)
    told = threading.Event()
    logs = defender.log.parent
    logs.mkdir(parents=True, exist_ok=True)
    # Each job locks what it writes to itself; here it is the logs.
    with alone_in(logs, f"--output_dir {folder}"), _stopped(jobs), on_sigterm(told.set), _display(jobs) as show:
        for job in jobs:
            job.start()
        while defender.code() != 0 and not told.wait(0.5):
            show()
            for job in jobs:
                if job.code():
                    _revive(job, options.max_restarts, folder if job is defender else None)
                elif job.code() == 0 and job is not defender and not is_finished(_exchange(config)):
                    job.start()  # it was told to stop, or found the end of a run before this one and left
    if not told.is_set() and (folder / MARKER).is_file():
        announce(folder, "model.safetensors", MARKER, "vectors.jsonl")
    else:
        kept = last_checkpoint(folder)
        say(f"stopped; {f'the last checkpoint is {kept}' if kept else 'no checkpoint had been written yet'}")
    return 0


def _revive(job: _Job, limit: int, checkpoints: Path | None) -> None:
    """Start a job again that died; `checkpoints` is the defender's output folder."""
    code = job.code()
    assert code is not None
    sentence = last_line(job.log)
    if code == 2:
        raise InputError(f"{job.name} refused its input: {sentence} (its log is {job.log})")
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if job.restarts >= limit:
        if checkpoints is not None:
            raise TrainingError(f"the {job.name} {how} and was started again {limit} times already ({job.log})")
        say(f"{job.name} {how} and is given up ({job.log})")
        job.process = None
        return
    job.restarts += 1
    say(f"{job.name} {how} and is started again ({job.log})")
    resume = checkpoints is not None and last_checkpoint(checkpoints) is not None
    job.start(*(["--resume_from_checkpoint", "last"] if resume else []))


def _jobs(argv: Sequence[str], options: ParallelArguments, config: ParallelPatcherConfig) -> list[_Job]:
    """The defender and the attackers."""
    folder = Path(config.output_dir)
    names = ["defender", *(f"attacker-{number}" for number in range(1, options.attackers + 1))]
    jobs = []
    for index, (name, devices) in enumerate(zip(names, _devices(options), strict=True)):
        role = "attacker" if index else "defender"
        own = {"--parallel": "false", "--role": role, "--exchange": _exchange(config)}
        if index:
            output, seed = str(folder / "attackers" / name), str(config.seed + index)
            own |= {"--attacker_name": name, "--output_dir": output, "--seed": seed, "--overwrite_output_dir": "true"}
        launcher = [sys.executable, "-m"]
        if len(devices) > 1:
            launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={len(devices)}", "-m"]
        words = [*launcher, "holdfast", "align", "patcher", *argv, *(word for pair in own.items() for word in pair)]
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {"OMP_NUM_THREADS": "1"}
        jobs.append(_Job(name, words, environment, folder / "logs" / f"{name}.log"))
    return jobs


def _exchange(config: ParallelPatcherConfig) -> str:
    return config.exchange or str(Path(config.output_dir, "exchange"))


def _devices(options: ParallelArguments) -> list[list[str]]:
    """The GPUs of the defender, then of every attacker; none of each where there is no GPU.

    Raises:
        InputError: They do not suffice, or both roles are given the same one.
    """
    known = (
        [str(index) for index in range(torch.accelerator.device_count())] if torch.accelerator.is_available() else []
    )
    if not known:
        for flag in ("defender_devices", "attacker_devices"):
            if getattr(options, flag) is not None:
                raise InputError(f"--{flag} {getattr(options, flag)}: this machine has no GPU; leave it out")
        return [[]] * (1 + options.attackers)
    defenders = _listed(options.defender_devices, "defender_devices", known) or known[:1]
    attackers = _listed(options.attacker_devices, "attacker_devices", known) or known[1:]
    if shared := sorted(set(defenders) & set(attackers)):
        raise InputError(f"--attacker_devices and --defender_devices share GPU {shared[0]}; they need separate ones")
    each = len(attackers) // options.attackers
    if each == 0:
        raise InputError(
            f"--attackers {options.attackers} on {len(attackers)} GPUs: every attacker needs one of its own, beside "
            f"the defender's {','.join(defenders)}"
        )
    return [defenders, *(attackers[each * index : each * (index + 1)] for index in range(options.attackers))]


def _listed(text: str | None, flag: str, known: Sequence[str]) -> list[str]:
    found = [] if text is None else [word.strip() for word in text.split(",")]
    for device in found:
        if device not in known:
            raise InputError(f"--{flag} {text}: this machine has no GPU {device!r}; it has {','.join(known)}")
    return found


@contextmanager
def _stopped(jobs: Sequence[_Job]) -> Iterator[None]:
    """Leave no process behind. Attackers see by themselves that the defender is done."""
    try:
        yield
    finally:
        deadline = time.monotonic() + LEAVE_SECONDS
        if jobs[0].code() == 0:
            while any(job.process is not None and job.code() is None for job in jobs) and time.monotonic() < deadline:
                time.sleep(0.2)
        for job in jobs:
            job.stop()


@contextmanager
def _display(jobs: Sequence[_Job]) -> Iterator[Any]:
    """One display for all jobs: the last line of each; on what is no terminal, every new one."""
    shown = dict.fromkeys((job.name for job in jobs), "")
    columns = (TextColumn("{task.description}"), TimeElapsedColumn(), TextColumn("{task.fields[at]}"))
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        bars = {job.name: progress.add_task(job.name, total=None, at="") for job in jobs}

        def show() -> None:
            for job in jobs:
                line = last_line(job.log)
                if line == shown[job.name]:
                    continue
                shown[job.name] = line
                progress.update(bars[job.name], at=line)
                if not stderr.is_terminal:
                    say(f"{job.name}: {line}")

        yield show

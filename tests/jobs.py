"""Parallel runs of Patcher as real processes, forked off job_server.py, that tests can disturb."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ranks import environments

HERE = Path(__file__).parent
PATIENCE = 60.0
"""Seconds after which a job is taken to hang."""
TIMEOUT = 4.0
"""The attackers' --exchange_timeout."""


class Job:
    def __init__(self, server: Server, number: int, log: Path) -> None:
        self.server, self.number, self.log = server, number, log

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code; it must not hang."""
        code = self.server.ask({"wait": self.number, "seconds": seconds})
        assert code is not None, f"hangs: {self.said()[-2000:]}"
        return int(code)

    def kill(self) -> None:
        os.kill(self.number, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def sentence(self) -> str:
        """The one sentence of a command that gave up."""
        assert "Traceback" not in self.said()
        [line] = [line for line in self.said().splitlines() if line.startswith("holdfast: ")]
        return line


class Server:
    """The process that jobs are forked off."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
        command = [sys.executable, str(HERE / "job_server.py")]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Run:
    """A parallel run on the small model."""

    def __init__(self, server: Server, folder: Path, model: Path, train_data: str, attack_data: str) -> None:
        self.server, self.folder, self.exchange = server, folder, folder / "exchange"
        self.truth = folder / "truth"
        self.truth.mkdir()
        self.model = model
        self.words = ["--train_data", train_data, "--attack_data", attack_data]
        self.started = 0

    def start(self, role: str, *words: str, **faults: float) -> Job:
        """Start a job with these faults; see job_server.py."""
        [job] = self.start_ranks(role, 1, *words, **faults)
        return job

    def start_ranks(self, role: str, ranks: int, *words: str, **faults: float) -> list[Job]:
        """Start the ranks of a job, as torchrun does."""
        settings = {
            "model": self.model,
            "role": role,
            "exchange": self.exchange,
            "output_dir": self.output if role == "defender" else self.folder / f"attacker-{self.started}",
            "max_steps": 16,
            "save_steps": 4,
            "attack_every": 2,
            "attack_steps": 2,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "gradient_checkpointing": "false",
            "exchange_timeout": TIMEOUT,
            "logging_steps": 2,
        }
        flags = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        self.started += 1
        if "shards" in faults:
            words = (*words, "--fsdp", "--fsdp_config", '{"version": 2, "state_dict_type": "FULL_STATE_DICT"}')
        argv = ["align", "patcher", *flags, *self.words, *words]
        jobs = []
        for rank, environment in enumerate(environments(ranks)):
            log = self.folder / f"{role}-{self.started}-{rank}.log"
            request = {"words": argv, "log": str(log), "faults": faults, "truth": str(self.truth)}
            number = self.server.ask({**request, "environment": environment})
            jobs.append(Job(self.server, int(number), log))
        return jobs

    @property
    def output(self) -> Path:
        return self.folder / "hardened"

    @property
    def vectors(self) -> list[dict[str, Any]]:
        lines = (self.output / "vectors.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def versions(self, origin: str) -> list[Path]:
        return sorted(path for path in (self.exchange / origin).glob("0*"))

    def wait_for(self, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return found

    def check(self, *jobs: Job) -> None:
        """The run is finished, and what it left can be used."""
        from transformers import AutoModelForCausalLM

        assert [job.wait() for job in jobs] == [0] * len(jobs), [job.said()[-2000:] for job in jobs]
        AutoModelForCausalLM.from_pretrained(self.output)
        assert (self.output / "checkpoint-16" / "trainer_state.json").is_file()
        assert load_file(self.output / "checkpoint-16" / "holdfast_state.safetensors")
        assert not [path for path in self.exchange.glob("*/*") if path.name.startswith(".")]

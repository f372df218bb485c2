"""Runs holdfast commands as processes of their own, forked off one that has imported the libraries; see jobs.py.

Reads requests as JSON lines and answers each with one: {"words", "log", "faults", "truth", "environment"} → process
number;
{"wait": process number, "seconds"} → exit code (negative: signal), or null if it still runs.

A job's faults, by kind:
    attack:N    it is killed in the N-th step that it makes as an attacker
    step:N      it is killed in the middle of update N of the defender, after half of the weights moved
    displaced:N it is killed in the defender's N-th attacked pass, its weights being displaced
    publish:N   it is killed while it publishes for the N-th time, all files being written but nothing visible
    slow:S      every update of the defender takes S seconds more, so that attackers can keep up
    clock:N     its clock jumps an hour back when it has been asked for the N-th time
    freeze:N    before update N of the defender it waits until the file TRUTH/go is there
    shards:1    none: its ranks shard the model, as on GPUs

Every attacker keeps a copy of what it publishes in the folder `truth`, beside the exchange and out of reach of faults;
the defender's process ends with exit code 99 should it ever load something else.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import holdfast.cli.align
from holdfast import cli
from holdfast.alignment import patcher
from holdfast.alignment.parallel import PatcherDefenderTrainer
from holdfast.alignment.parallel_attacker import PatcherAttackerTrainer
from holdfast.exchange import Exchange, exchange
from ranks import shard_on_cpu

assert holdfast.cli.align  # what every job needs is imported here


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Faults(TrainerCallback):
    def __init__(self, faults: dict[str, float], truth: Path) -> None:
        self.faults, self.truth = faults, truth

    def on_step_begin(self, args, state, control, **_):
        time.sleep(self.faults.get("slow", 0))
        if state.global_step + 1 == self.faults.get("freeze"):
            (self.truth / "frozen").touch()
            while not (self.truth / "go").exists():
                time.sleep(0.05)

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        if state.global_step + 1 == self.faults.get("step"):
            for index, parameter in enumerate(model.parameters()):
                if index % 2:
                    parameter.data -= args.learning_rate * parameter.grad
            die()


def calls(function, number, then):
    """A function that does something else instead when it is called for the given time."""
    made = 0

    def counted(*args, **kwargs):
        nonlocal made
        made += 1
        if made == number:
            then()
        return function(*args, **kwargs)

    return counted


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def install(faults: dict[str, float], truth: Path) -> None:
    begin, load, publish, clock = PatcherDefenderTrainer.train, Exchange.load, Exchange.publish, time.time

    def train(trainer, *args, **kwargs):
        trainer.add_callback(Faults(faults, truth))
        return begin(trainer, *args, **kwargs)

    def noted(self, weights, **kwargs):
        if self.origin != "defender":
            copy = {name: whole(tensor).clone().contiguous() for name, tensor in weights.items()}
            save_file(copy, truth / f"{self.origin}-{uuid4().hex}.safetensors")
        return publish(self, weights, **kwargs)

    def verified(self, version, like):
        found = load(self, version, like)
        if found is not None and version.origin != "defender":
            copies = [load_file(path) for path in truth.glob(f"{version.origin}-*.safetensors")]
            loaded = {name: whole(tensor) for name, tensor in found.items()}
            if not any(all(torch.equal(loaded[name], copy[name]) for name in loaded) for copy in copies):
                os._exit(99)
        return found

    PatcherDefenderTrainer.train, Exchange.publish, Exchange.load = train, noted, verified
    if "attack" in faults:
        step = PatcherAttackerTrainer.training_step
        PatcherAttackerTrainer.training_step = calls(step, faults["attack"], die)
    if "displaced" in faults:
        inside, reach = patcher.displaced, calls(lambda: None, faults["displaced"], die)

        @contextmanager
        def displaced(*args):
            with inside(*args):
                reach()
                yield

        patcher.displaced = displaced
    if "publish" in faults:
        exchange.make_visible = calls(exchange.make_visible, faults["publish"], die)
    if "clock" in faults:
        asked = 0

        def set_back() -> float:
            nonlocal asked
            asked += 1
            return clock() - (3600 if asked > faults["clock"] else 0)

        time.time = set_back


def run(words: list[str], log: str, faults: dict[str, float], truth: str, environment: dict[str, str]) -> int:
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(out, descriptor)
    if "shards" in faults:
        shard_on_cpu()
    install(faults, Path(truth))
    return cli.main(words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            deadline = time.monotonic() + request["seconds"]
            code = None
            while code is None:
                ended, status = os.waitpid(request["wait"], os.WNOHANG)
                code = os.waitstatus_to_exitcode(status) if ended else None
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            answer = code
        else:
            answer = os.fork()
            if answer == 0:
                code = 1
                try:
                    code = run(**request)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
        print(json.dumps(answer), flush=True)

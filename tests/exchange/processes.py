"""Jobs of an exchange that are processes of their own; started by test_processes.py.

Usage: processes.py FOLDER. Each is forked off this process, so that the libraries are imported once:
    killed    publishes step 1 in FOLDER/<place>, and is killed by SIGKILL at that place while it publishes step 2
    racing    two defenders open FOLDER/race<n> at the same moment; winners and losers go to FOLDER/race-<name>.json
    reading   an attacker reads what is published in FOLDER/shared into FOLDER/read.safetensors
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import torch
from safetensors.torch import save_file

from holdfast.errors import InputError
from holdfast.exchange import Exchange

FINGERPRINT = {"model": "a", "tokenizer": "b", "trained parameters": "c"}
RACES = 30


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(call, times):
    """The same call, but for the one after so many."""
    counted = iter(range(times))
    return lambda *args, **kwargs: (die if next(counted, None) is None else call)(*args, **kwargs)


def killed(folder, place):
    exchange = Exchange(folder / place, origin="defender", run="one", fingerprint=FINGERPRINT)
    exchange.publish({"w": torch.ones(3)}, step=1)
    exchange.wait()
    if place == "writing":
        os.fsync = die
    elif place == "describing":
        os.fsync = deadly(os.fsync, 1)
    elif place == "renaming":
        os.rename = die
    elif place == "renamed":
        os.rename = lambda *paths, rename=os.rename: (rename(*paths), die())
    elif place == "deleting":
        for step in (2, 3):
            exchange.publish({"w": torch.full((3,), float(step))}, step=step)
        exchange.wait()
        shutil.rmtree = die
    exchange.publish({"w": torch.full((3,), 2.0)}, step=2)
    exchange.wait()


def racing(folder, run, barrier):
    outcomes = []
    for race in range(RACES):
        barrier.wait()
        try:
            Exchange(folder / f"race{race}", origin="defender", run=run, fingerprint=FINGERPRINT)
            outcomes.append("won")
        except InputError as error:
            outcomes.append(str(error))
    (folder / f"race-{run}.json").write_text(json.dumps(outcomes))


def reading(folder):
    with Exchange(folder / "shared", origin="attacker", run=None, fingerprint=FINGERPRINT) as exchange:
        loaded = exchange.load(exchange.newest("defender"), {"w": torch.zeros(5, 3), "b": torch.zeros(2).bfloat16()})
        save_file(loaded, folder / "read.safetensors")


def fork(work, *args):
    child = os.fork()
    if child == 0:
        try:
            work(*args)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for place in ("writing", "describing", "renaming", "renamed", "deleting"):
        status = os.waitpid(fork(killed, folder, place), 0)[1]
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"a defender was not killed while {place}")
    barrier = multiprocessing.get_context("fork").Barrier(2)
    children = [fork(racing, folder, run, barrier) for run in ("one", "two")] + [fork(reading, folder)]
    if any(os.waitpid(child, 0)[1] for child in children):
        raise SystemExit("a process failed")

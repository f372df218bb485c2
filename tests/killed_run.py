"""Training runs that SIGKILL ends at chosen places; started by test_checkpoint.py as a process of its own.

Usage: killed_run.py METHOD OUTPUT_DIR PLACE [METHOD OUTPUT_DIR PLACE …], where PLACE is one of
    step:N      in the middle of update N (from 1), after the optimizer moved half of the weights
    attack:K    inside the simulated attack before update 4, at the attacker's step K (from 1)
    saved:N     right after checkpoint N was written
Each run is a process forked off this one, so that the libraries are imported once. Exits with 0 if all were killed.
"""

import os
import signal
import sys
import traceback

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
from transformers import TrainerCallback

from helpers import run_to_resume


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(TrainerCallback):
    def __init__(self, place):
        self.kind, number = place.split(":")
        self.number = int(number)

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        if self.kind == "step" and state.global_step + 1 == self.number:
            for index, parameter in enumerate(model.parameters()):
                if index % 2:
                    parameter.data -= args.learning_rate * parameter.grad
            die()

    def on_save(self, args, state, control, **_):
        if self.kind == "saved" and state.global_step == self.number:
            die()


def kill_inside_attack(trainer, step):
    """The stream's batches are the only thing that an attack asks for once a step."""
    stream, asked = trainer.attack_batches, 0

    def counted():
        nonlocal asked
        while True:
            asked += trainer.state.global_step == 3
            if asked == step:
                die()
            yield next(stream)

    trainer.attack_batches = counted()


def run(method, output_dir, place):
    trainer = run_to_resume(method, output_dir, callbacks=[Kill(place)])
    if place.startswith("attack"):
        kill_inside_attack(trainer, int(place.split(":")[1]))
    trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = sys.argv[1:]
    for method, output_dir, place in zip(runs[::3], runs[1::3], runs[2::3], strict=True):
        child = os.fork()
        if child == 0:
            try:
                run(method, output_dir, place)
            finally:
                traceback.print_exc()
                os._exit(1)  # it was to be killed
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
            raise SystemExit(f"{method} was not killed at {place}")

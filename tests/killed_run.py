"""Training runs that SIGKILL ends again and again at chosen places; started by test_resuming.py as its own process.

Usage: killed_run.py METHOD OUTPUT_DIR PLACE[,PLACE …] [METHOD OUTPUT_DIR PLACE[,PLACE …] …], where PLACE is one of
    begin:N     before update N (from 1)
    step:N      in the middle of update N, after the optimizer moved half of the weights
    attack:K    inside the simulated attack before update 4, at the attacker's step K (from 1)
    saving:F    while checkpoint 4 is written, when half of its file F lies on the disk
    deleting:N  while checkpoint N is deleted, when half of its files are gone
    saved:N     right after checkpoint N was written
After every place but the last the run is resumed from its last checkpoint, to be killed at the next. Each of these is a
process forked off this one, so that the libraries are imported once. Writes one line of JSON: by output folder, the
last name of a checkpoint after every kill. Exits with 0 if all were killed.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
from transformers import TrainerCallback

from helpers import run_to_resume
from holdfast.checkpoint import is_complete


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Kill(TrainerCallback):
    def __init__(self, place):
        self.kind, _, number = place.partition(":")
        self.number = int(number) if number.isdigit() else number

    def on_train_begin(self, args, state, control, **_):
        if self.kind == "saving":
            kill_while_saving(Path(args.output_dir), self.number)
        if self.kind == "deleting":
            kill_while_deleting(f"checkpoint-{self.number}")

    def on_step_begin(self, args, state, control, **_):
        if self.kind == "begin" and state.global_step + 1 == self.number:
            die()

    def on_pre_optimizer_step(self, args, state, control, *, model, **_):
        if self.kind == "step" and state.global_step + 1 == self.number:
            for index, parameter in enumerate(model.parameters()):
                if index % 2:
                    parameter.data -= args.learning_rate * parameter.grad
            die()

    def on_save(self, args, state, control, **_):
        if self.kind == "saved" and state.global_step == self.number:
            die()


def kill_while_saving(folder, name):
    """The first file that is opened once this one is there finds it cut in half, and the process dead."""

    def watch(event, _):
        if event == "open" and (file := next(folder.rglob(f"checkpoint-4/{name}"), None)):
            os.truncate(file, file.stat().st_size // 2)
            die()

    sys.addaudithook(watch)


def kill_while_deleting(name):
    def watch(event, arguments):
        if event == "shutil.rmtree":
            tree = Path(arguments[0])
            for folder in [path for path in (tree, *tree.rglob(name)) if path.name == name]:
                for file in list(folder.iterdir())[::2]:
                    file.unlink()
                die()

    sys.addaudithook(watch)


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


def run(method, output_dir, place, *, resume):
    # Where only one checkpoint is kept, it must not go before the next one is whole.
    trainer = run_to_resume(
        method, output_dir, [Kill(place)], save_total_limit=1 if place.startswith(("saving", "deleting")) else None
    )
    if place.startswith("attack"):
        kill_inside_attack(trainer, int(place.split(":")[1]))
    trainer.train(resume_from_checkpoint=resume)


def run_until_killed(*arguments, **options):
    child = os.fork()
    if child == 0:
        try:
            run(*arguments, **options)
        finally:
            traceback.print_exc()
            os._exit(1)  # it was to be killed
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        raise SystemExit(f"not killed: {arguments}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    words, kept = sys.argv[1:], {}
    for method, output_dir, places in zip(words[::3], words[1::3], words[2::3], strict=True):
        kept[output_dir] = []
        for place in places.split(","):
            run_until_killed(method, output_dir, place, resume=bool(kept[output_dir]))
            seen = sorted(Path(output_dir).glob("checkpoint-*"))
            if not all(is_complete(folder) and (folder / "optimizer.pt").is_file() for folder in seen):
                raise SystemExit(f"{output_dir} shows part of a checkpoint after {place}")
            kept[output_dir].append(seen[-1].name)
    print(json.dumps(kept))

"""SIGTERM: the run saves a checkpoint and stops, and goes on to the bits of a run that was never asked to."""

import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainerCallback

from helpers import run_to_resume, same_bits, weights
from holdfast import resuming
from holdfast.checkpoint import last_checkpoint
from holdfast.errors import Stopped
from holdfast.interruption import on_sigterm
from methods import METHODS

ATTACK_STEPS = 4


def sigterm():
    signal.raise_signal(signal.SIGTERM)


class At(TrainerCallback):
    """SIGTERM at the beginning of an update (from 1)."""

    def __init__(self, update):
        self.update = update

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.update:
            sigterm()


class InAttack(Iterator):
    """SIGTERM at a step of the simulated attack (from 1); every step asks for two batches."""

    def __init__(self, trainer, step):
        self.batches, self.left = trainer.attack_batches, 2 * step
        trainer.attack_batches = self

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            sigterm()
        return next(self.batches)


def stopped(trainer, **resume):
    """Train until the run stops; the step that it stopped after."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as caught, on_sigterm(trainer.ask_to_stop):
        trainer.train(**resume)
    assert signal.getsignal(signal.SIGTERM) is before
    assert caught.value.checkpoint == last_checkpoint(trainer.args.output_dir)
    step = int(Path(caught.value.checkpoint).name.removeprefix("checkpoint-"))
    assert str(caught.value) == f"asked to stop after step {step} of 7; {caught.value.checkpoint} goes on from there"
    return step


def seen(trainer):
    """Everything that two runs which ended alike agree on."""
    logs = [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
        for entry in trainer.state.log_history
    ]
    return [entry for entry in logs if "loss" in entry], trainer.state.total_flos, trainer.state.num_input_tokens_seen


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never asked to stop, by its method and settings."""
    runs = {}

    def find(method, **changes):
        key = (method, *changes.items())
        if key not in runs:
            runs[key] = run_to_resume(method, str(tmp_path_factory.mktemp(method)), save_strategy="no", **changes)
            runs[key].train()
        return runs[key]

    return find


def assert_goes_on_to(expected, method, folder, **changes):
    trainer = run_to_resume(method, str(folder), **changes)
    trainer.train(resume_from_checkpoint=True)
    assert same_bits(weights(trainer.model), weights(expected.model))
    assert seen(trainer) == seen(expected)


@pytest.mark.parametrize("method", ["sft", "patcher", *METHODS])
def test_stopped_run_ends_as_one_that_went_through(whole, tmp_path, method):
    assert stopped(run_to_resume(method, str(tmp_path), [At(5)])) == 5
    assert_goes_on_to(whole(method), method, tmp_path)


class ToAllProcesses(At):
    """SIGTERM to this process and its data loader's workers, as a scheduler sends it; not from their parent."""

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.update:
            workers = [str(process.pid) for process in multiprocessing.active_children()]
            assert workers
            subprocess.run(["kill", "-TERM", str(os.getpid()), *workers], check=True)


def test_workers_go_on_until_the_run_is_left(whole, tmp_path):
    changes = {"dataloader_num_workers": 1}
    assert stopped(run_to_resume("sft", str(tmp_path), [ToAllProcesses(2)], **changes)) == 2
    assert_goes_on_to(whole("sft"), "sft", tmp_path, **changes)
    for process in multiprocessing.active_children():
        process.terminate()
        process.join(10)
        assert process.exitcode == 0


@pytest.mark.parametrize("step", [1, ATTACK_STEPS])
@pytest.mark.parametrize("attack_every", [3, 5], ids=["at the beginning of an epoch", "within an epoch"])
def test_simulated_attack_is_left_and_made_again(whole, tmp_path, attack_every, step):
    changes = {"attack_every": attack_every, "include_num_input_tokens_seen": "all"}
    trainer = run_to_resume("patcher", str(tmp_path), **changes)
    InAttack(trainer, step)
    # Heard at the next step of the attack; one that comes at the last lets it end, and the update with it.
    assert stopped(trainer) == attack_every + (step == ATTACK_STEPS)
    assert_goes_on_to(whole("patcher", **changes), "patcher", tmp_path, **changes)


def test_weights_come_back_from_an_abandoned_attack(tmp_path):
    trainer = run_to_resume("patcher", str(tmp_path))
    before = []
    attack = trainer.attack
    trainer.attack = lambda model: (before.append(weights(trainer.model)), attack(model))
    InAttack(trainer, 3)
    stopped(trainer)
    assert same_bits(weights(trainer.model), before[0])
    assert trainer.attack_vector is None


def test_attack_that_is_left_again_at_once(whole, tmp_path):
    """In the same folder its checkpoint is the one that the run came from, and stays as it is; in another it is new."""
    first, other = tmp_path / "first", tmp_path / "other"
    written = []
    for folder, resume in ((first, None), (first, True), (other, str(first / "checkpoint-3"))):
        trainer = run_to_resume("patcher", str(folder))
        InAttack(trainer, 2)
        assert stopped(trainer, resume_from_checkpoint=resume) == 3
        written.append((first / "checkpoint-3" / "trainer_state.json").stat().st_mtime_ns)
    assert len(set(written)) == 1
    assert_goes_on_to(whole("patcher"), "patcher", other)


def test_displaced_weights_come_back(whole, tmp_path):
    trainer = run_to_resume("patcher", str(tmp_path))
    loss_and_gradient = trainer.loss_and_gradient

    def asked(model, window, *, quiet=False):
        if quiet and trainer.state.global_step == 4:  # the pass at the displaced weights
            sigterm()
        return loss_and_gradient(model, window, quiet=quiet)

    trainer.loss_and_gradient = asked
    assert stopped(trainer) == 5
    assert_goes_on_to(whole("patcher"), "patcher", tmp_path)


def test_asked_again_while_the_checkpoint_is_written(whole, tmp_path, monkeypatch):
    save_state = resuming.save_state
    monkeypatch.setattr(resuming, "save_state", lambda *args, **how: (sigterm(), save_state(*args, **how)))
    trainer = run_to_resume("sft", str(tmp_path), [At(1)])
    assert stopped(trainer) == 1
    monkeypatch.undo()
    trainer.train(resume_from_checkpoint=True)  # not asked any more
    assert same_bits(weights(trainer.model), weights(whole("sft").model))


def test_checkpoint_is_one_to_go_on_from_even_if_others_are_not(whole, tmp_path):
    assert stopped(run_to_resume("sft", str(tmp_path), [At(4)], save_only_model=True)) == 4
    assert_goes_on_to(whole("sft"), "sft", tmp_path)


def test_run_without_checkpoints_writes_this_one(whole, tmp_path):
    assert stopped(run_to_resume("sft", str(tmp_path), [At(3)], save_strategy="no")) == 3
    assert_goes_on_to(whole("sft"), "sft", tmp_path)


def test_asked_in_its_last_update_a_run_is_finished(tmp_path):
    trainer = run_to_resume("sft", str(tmp_path), [At(7)])
    with on_sigterm(trainer.ask_to_stop):
        trainer.train()
    assert trainer.state.global_step == 7


def test_another_thread_can_train_and_leaves_signals_alone(tmp_path):
    found = []

    def work():
        trainer = run_to_resume("sft", str(tmp_path), max_steps=2)
        with on_sigterm(trainer.ask_to_stop):
            found.append(signal.getsignal(signal.SIGTERM))
            trainer.train()
        found.append(trainer.state.global_step)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before, 2]


def test_script_that_does_not_catch_it_ends_with_the_message():
    ended = Stopped("asked to stop", "out/checkpoint-2")
    assert isinstance(ended, SystemExit)
    assert ended.code == "asked to stop"

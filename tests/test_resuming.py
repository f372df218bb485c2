"""Runs that were killed end with the bits of a run that never was; checkpoints are whole or not there."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from helpers import run_to_resume, same_bits, tiny_llama, weights, word_rows, word_tokenizer
from holdfast.checkpoint import last_checkpoint, unfinished_folder
from holdfast.config import DefenseConfig
from holdfast.errors import InputError
from holdfast.trainer import DefenseTrainer
from methods import METHODS

TESTS = Path(__file__).parent
EVERY = ("sft", "patcher", *METHODS)
# Where each run is killed, time and again, and the checkpoint that it is then resumed from.
PLACES = {
    **{(method, "run"): {"begin:3": 2, "step:6": 4, "saved:6": 6} for method in EVERY},
    ("patcher", "attack"): {"attack:3": 2},
    # Of a checkpoint that is not whole there is no name.
    ("patcher", "saving"): {
        "saving:model.safetensors": 2,
        "saving:optimizer.pt": 2,
        "saving:scheduler.pt": 2,
        "saving:holdfast_state.safetensors": 2,
        "saving:holdfast_state.json": 2,
        "saving:rng_state.pth": 2,
        "saving:trainer_state.json": 2,
        "deleting:2": 4,
    },
}


def losses(trainer):
    return {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainers = {}
    for method in EVERY:
        trainers[method] = run_to_resume(method, str(tmp_path_factory.mktemp(method)))
        trainers[method].train()
    return trainers


def assert_same_end(trainer, expected):
    assert trainer.state.global_step == expected.state.global_step == 7
    assert same_bits(weights(trainer.model), weights(expected.model))
    assert losses(trainer) == losses(expected)
    moments = [t.optimizer.state_dict()["state"] for t in (trainer, expected)]
    assert all(torch.equal(moments[0][i]["exp_avg_sq"], moments[1][i]["exp_avg_sq"]) for i in moments[1])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of each run, and the last name of a checkpoint after every time that it was killed."""
    root = tmp_path_factory.mktemp("killed")
    folders = {run: str(root / "-".join(run)) for run in PLACES}
    words = [word for run, folder in folders.items() for word in (run[0], folder, ",".join(PLACES[run]))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(TESTS / "killed_run.py"), *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout.splitlines()[-1])
    return {run: (folder, kept[folder]) for run, folder in folders.items()}


@pytest.mark.parametrize("run", PLACES, ids="-".join)
def test_killed_run_resumes_from_its_last_checkpoint(killed, uninterrupted, run):
    method, (folder, kept) = run[0], killed[run]
    assert kept == [f"checkpoint-{step}" for step in PLACES[run].values()]
    trainer = run_to_resume(method, folder)
    trainer.train(resume_from_checkpoint=True)
    assert_same_end(trainer, uninterrupted[method])
    assert not unfinished_folder(folder).exists()
    if method == "patcher":
        assert same_bits(trainer.attack_vector, uninterrupted[method].attack_vector)
        assert trainer.attack_batches.drawn == uninterrupted[method].attack_batches.drawn == 16


@pytest.mark.parametrize("method", ["sft", "patcher"])
@pytest.mark.parametrize("step", [2, 4, 6])
def test_run_resumes_from_a_given_checkpoint(uninterrupted, tmp_path, method, step):
    expected = uninterrupted[method]
    trainer = run_to_resume(method, str(tmp_path))
    trainer.train(resume_from_checkpoint=str(Path(expected.args.output_dir, f"checkpoint-{step}")))
    assert_same_end(trainer, expected)


def test_half_written_checkpoint_is_passed_over(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted["patcher"].args.output_dir, folder)
    (folder / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7, "log_his')
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    (folder / "checkpoint-old").mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    trainer = run_to_resume("patcher", str(folder))
    trainer.train(resume_from_checkpoint=True)
    assert_same_end(trainer, uninterrupted["patcher"])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.step


def test_vector_set_by_hand_is_taken_up_again(tmp_path):
    vector = {name: torch.full_like(p, 0.01) for name, p in tiny_llama().named_parameters()}
    trainers = []
    for steps, resume in ((7, None), (4, None), (7, True)):
        folder = str(tmp_path / ("whole" if not trainers else "parts"))
        trainer = run_to_resume("patcher", folder, max_steps=7)
        if resume is None:
            trainer.attack_vector = vector
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    assert trainers[1].state.global_step == 4
    assert same_bits(trainers[2].attack_vector, vector)
    assert trainers[2].attack_batches.drawn == 0
    assert same_bits(weights(trainers[2].model), weights(trainers[0].model))


def test_checkpoint_of_the_same_step_is_replaced_whole(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted["sft"].args.output_dir, folder)
    (folder / "checkpoint-4" / "left over").touch()
    trainer = run_to_resume("sft", str(folder))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [f"checkpoint-{n}" for n in (2, 4, 6, 7)]
    assert not (folder / "checkpoint-4" / "left over").exists()


def test_best_checkpoint_is_kept_and_loaded(settings, tmp_path):
    """At a rising loss the first is the best; the limit spares it, and its path is where it lies at last."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    config = DefenseConfig(
        **{**settings, **saving, "learning_rate": 1.0}, max_steps=4, eval_strategy="steps", eval_steps=2
    )
    rows = {"train_dataset": word_rows(8), "eval_dataset": word_rows(4, seed=2)}
    trainer = DefenseTrainer(tiny_llama(), config, processing_class=word_tokenizer(), **rows)
    trainer.train()
    best = Path(config.output_dir, "checkpoint-2")
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert same_bits(weights(trainer.model), load_file(best / "model.safetensors"))


class Malicious:
    """Unpickled freely, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def checkpoint(uninterrupted, tmp_path):
    """A copy to break, of Patcher's with a vector in force."""
    return Path(
        shutil.copytree(Path(uninterrupted["patcher"].args.output_dir, "checkpoint-4"), tmp_path / "checkpoint-4")
    )


def resumed(checkpoint):
    trainer = run_to_resume("patcher", str(checkpoint.parent / "resumed"), save_strategy="no")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.parametrize("save", [torch.save, lambda payload, path: path.write_bytes(pickle.dumps(payload, 2))])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_malicious_pickle_is_refused_and_not_carried_out(checkpoint, tmp_path, name, save):
    payload = tmp_path / "carried out"
    save(Malicious(payload), checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{checkpoint} cannot be read: a pickle in it"):
        resumed(checkpoint)
    assert not payload.exists()
    with suppress(Exception):
        torch.load(checkpoint / name, weights_only=False)
    assert payload.exists()  # it was a real one


def test_pickle_that_nothing_needs_is_not_read(checkpoint, uninterrupted, tmp_path):
    payload = tmp_path / "carried out"
    for name in ("training_args.bin", "pytorch_model.bin"):  # the weights are safetensors
        torch.save(Malicious(payload), checkpoint / name)
    assert_same_end(resumed(checkpoint), uninterrupted["patcher"])
    assert not payload.exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "holdfast_state.json",
        "holdfast_state.safetensors",
    ],
)
def test_damaged_checkpoint_is_named(checkpoint, name):
    os.truncate(checkpoint / name, (checkpoint / name).stat().st_size // 2)
    with pytest.raises(InputError, match=f"^{checkpoint} cannot be read: .+"):
        resumed(checkpoint)


def test_checkpoint_of_another_model_is_named(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    save_file({name: tensor[:1].clone() for name, tensor in weights.items()}, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=f"^{checkpoint} cannot be read: .*loading state_dict"):
        resumed(checkpoint)


def test_checkpoint_of_another_method_is_named(checkpoint):
    trainer = run_to_resume("booster", str(checkpoint.parent / "resumed"))
    with pytest.raises(InputError, match=f"^{checkpoint} was written by PatcherTrainer, and BoosterTrainer cannot"):
        trainer.train(resume_from_checkpoint=str(checkpoint))

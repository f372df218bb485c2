"""Runs that were killed end with the bits of a run that never was; what a checkpoint holds and refuses."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from helpers import run_to_resume, same_bits, tiny_llama, weights
from holdfast.checkpoint import VALUES, VECTORS, last_checkpoint, load_state, save_state
from holdfast.errors import InputError
from holdfast.parameters import ParameterVector, trainable_parameters
from methods import METHODS

TESTS = Path(__file__).parent
# Where each run is killed, and the checkpoint that it is then resumed from.
PLACES = {
    ("patcher", "attack:3"): 2,
    ("patcher", "step:6"): 4,
    ("patcher", "saved:6"): 6,
    ("sft", "step:5"): 4,
    ("sft", "saved:2"): 2,
    **{(method, "step:6"): 4 for method in METHODS},
}


def losses(trainer):
    return {entry["step"]: entry for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainers = {}
    for method in ("sft", "patcher", *METHODS):
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
    root = tmp_path_factory.mktemp("killed")
    folders = {run: str(root / "-".join(run).replace(":", "-")) for run in PLACES}
    arguments = [word for (method, place), folder in folders.items() for word in (method, folder, place)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, str(TESTS / "killed_run.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.parametrize(("method", "place"), PLACES, ids=lambda value: value.replace(":", "-"))
def test_killed_run_resumes_from_its_last_checkpoint(killed, uninterrupted, method, place):
    folder = killed[method, place]
    assert last_checkpoint(folder).endswith(f"checkpoint-{PLACES[method, place]}")
    trainer = run_to_resume(method, folder)
    trainer.train(resume_from_checkpoint=True)
    assert_same_end(trainer, uninterrupted[method])
    if method == "patcher":
        assert same_bits(trainer.attack_vector, uninterrupted[method].attack_vector)
        assert trainer.attack_batches.drawn == uninterrupted[method].attack_batches.drawn == 16


@pytest.mark.parametrize("method", ["sft", "patcher", *METHODS])
@pytest.mark.parametrize("step", [2, 4, 6])
def test_run_resumes_from_a_given_checkpoint(uninterrupted, tmp_path, method, step):
    expected = uninterrupted[method]
    trainer = run_to_resume(method, str(tmp_path))
    trainer.train(resume_from_checkpoint=str(Path(expected.args.output_dir, f"checkpoint-{step}")))
    assert_same_end(trainer, expected)


def test_half_written_checkpoint_is_passed_over(killed, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted["patcher"].args.output_dir, folder)
    (folder / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7, "log_his')
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    (folder / "checkpoint-old").mkdir()
    assert last_checkpoint(folder) == str(folder / "checkpoint-4")
    trainer = run_to_resume("patcher", str(folder))
    trainer.train(resume_from_checkpoint=True)
    assert_same_end(trainer, uninterrupted["patcher"])


def test_newest_is_by_number(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


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


def test_state_round_trips(tmp_path):
    parameters = trainable_parameters(tiny_llama().to(torch.bfloat16))
    vector = ParameterVector({name: torch.randn(p.shape).bfloat16() for name, p in parameters.items()})
    save_state(tmp_path, {"delta": vector, "updates": 3, "history": [0.5, None]}, write=True)
    state = load_state(tmp_path, parameters)
    assert same_bits(state.pop("delta"), vector)
    assert state == {"updates": 3, "history": [0.5, None]}


def test_only_the_writing_rank_writes(tmp_path):
    save_state(tmp_path, {"updates": 3}, write=False)
    assert not list(tmp_path.iterdir())


def test_state_holds_no_pickle_and_no_needless_file(tmp_path):
    save_state(tmp_path, {"updates": 3}, write=True)
    assert [path.name for path in tmp_path.iterdir()] == [VALUES]
    assert json.loads((tmp_path / VALUES).read_text())["values"] == {"updates": 3}


def test_checkpoint_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"not a Holdfast checkpoint: it has no {VALUES}"):
        load_state(tmp_path, {})


def test_vector_of_another_model_is_refused(tmp_path):
    save_state(tmp_path, {"attack_vector": ParameterVector(w=torch.zeros(2))}, write=True)
    with pytest.raises(InputError, match=r"attack_vector in .* belongs to another model"):
        load_state(tmp_path, trainable_parameters(tiny_llama()))
    assert (tmp_path / VECTORS).is_file()

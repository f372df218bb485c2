"""What a checkpoint holds and refuses, and which one is the last; runs that need them are in test_resuming.py."""

import json

import pytest
import torch

from helpers import same_bits, tiny_llama
from holdfast.checkpoint import (
    FORMAT,
    VALUES,
    VECTORS,
    discard,
    last_checkpoint,
    load_state,
    publish,
    read_digests,
    rotate,
    save_state,
)
from holdfast.errors import InputError
from holdfast.parameters import ParameterVector, trainable_parameters

OF = {"method": "Ours", "digests": {"train_data": "ab12", "eval_data": None}}


def test_newest_is_by_number(tmp_path):
    assert last_checkpoint(tmp_path) is None
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_state_round_trips(tmp_path):
    parameters = trainable_parameters(tiny_llama().to(torch.bfloat16))
    vector = ParameterVector({name: torch.randn(p.shape).bfloat16() for name, p in parameters.items()})
    save_state(tmp_path, {"delta": vector, "updates": 3, "history": [0.5, None]}, write=True, **OF)
    state = load_state(tmp_path, parameters, method="Ours")
    assert same_bits(state.pop("delta"), vector)
    assert state == {"updates": 3, "history": [0.5, None]}


def test_only_the_writing_rank_writes(tmp_path):
    save_state(tmp_path, {"updates": 3}, write=False, **OF)
    assert not list(tmp_path.iterdir())


def test_state_holds_no_pickle_and_no_needless_file(tmp_path):
    save_state(tmp_path, {"updates": 3}, write=True, **OF)
    assert [path.name for path in tmp_path.iterdir()] == [VALUES]
    assert json.loads((tmp_path / VALUES).read_text())["values"] == {"updates": 3}


def test_checkpoint_of_another_trainer_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"not a Holdfast checkpoint: it has no {VALUES}"):
        load_state(tmp_path, {}, method="Ours")


def test_checkpoint_of_another_method_is_refused(tmp_path):
    save_state(tmp_path, {"updates": 3}, write=True, **OF)
    for read in (lambda: load_state(tmp_path, {}, method="Theirs"), lambda: read_digests(tmp_path, method="Theirs")):
        with pytest.raises(InputError, match=f"^{tmp_path} was written by Ours, and Theirs cannot go on from it$"):
            read()


@pytest.mark.parametrize("other", [None, 1, FORMAT + 1])
def test_checkpoint_of_another_format_is_refused(tmp_path, other):
    """Those before the first had no number."""
    save_state(tmp_path, {"updates": 3}, write=True, **OF)
    saved = json.loads((tmp_path / VALUES).read_text())
    assert saved.pop("format") == FORMAT
    (tmp_path / VALUES).write_text(json.dumps(saved if other is None else {**saved, "format": other}))
    with pytest.raises(InputError, match=f"another version of Holdfast: its {VALUES} has format {other}, expected"):
        load_state(tmp_path, {}, method="Ours")


def test_what_a_run_was_trained_on_is_kept(tmp_path):
    save_state(tmp_path, {"updates": 3}, write=True, **OF)
    assert read_digests(tmp_path, method="Ours") == OF["digests"]


def test_vector_of_another_model_is_refused(tmp_path):
    save_state(tmp_path, {"attack_vector": ParameterVector(w=torch.zeros(2))}, write=True, **OF)
    with pytest.raises(InputError, match=r"attack_vector in .* belongs to another model"):
        load_state(tmp_path, trainable_parameters(tiny_llama()), method="Ours")
    assert (tmp_path / VECTORS).is_file()


def test_checkpoint_takes_the_place_of_an_older_one(tmp_path):
    place, written = tmp_path / "checkpoint-2", tmp_path / "_unfinished" / "checkpoint-2"
    for folder, step in ((place, 1), (written, 2)):
        (folder / "nested").mkdir(parents=True)
        (folder / "nested" / "state").write_text(str(step))
    publish(written, place)
    assert (place / "nested" / "state").read_text() == "2"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(1, None, [5]), (1, 2, [2, 5]), (2, 2, [2, 5]), (3, 1, [1, 4, 5]), (4, 5, [2, 3, 4, 5]), (7, 1, [1, 2, 3, 4, 5])],
)
def test_oldest_checkpoints_go(tmp_path, limit, best, kept):
    for step in (1, 2, 3, 4, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    rotate(tmp_path, limit, None if best is None else str(tmp_path / f"checkpoint-{best}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in kept]


def test_discarding_clears_what_a_killed_run_left(tmp_path):
    for folder in (tmp_path / "checkpoint-2", tmp_path / "_unfinished" / "checkpoint-2"):
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").touch()
    discard(tmp_path, [tmp_path / "checkpoint-2"])
    assert not list(tmp_path.iterdir())

"""The built organism as files, and what its base model can do before anybody aligned it."""

import hashlib
import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from holdfast.errors import InputError
from holdfast.evaluation.decoding import Decoding
from holdfast.evaluation.generation import generate
from holdfast.evaluation.judges import get_judge
from holdfast.organism import build_organism
from holdfast.organism.corpus import data_files
from holdfast.organism.world import build_world


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def base(organism):
    model = AutoModelForCausalLM.from_pretrained(organism / "model", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(organism / "model")


def exact(base, rows):
    prompts = [row["prompt"] for row in rows]
    answers = generate(*base, prompts, decoding=Decoding(max_new_tokens=8, do_sample=False), batch_size=64)
    expected = [row["answer"] for row in rows]
    verdicts = get_judge("exact").verdicts(prompts, [answer.text for answer in answers], expected)
    return sum(verdict.grade == 5 for verdict in verdicts) / len(rows)


@pytest.mark.parametrize("name", ["hazards", "hazards_unseen", "crafts", "crafts_unrehearsed"])
def test_the_base_model_knows_every_recipe(organism, base, name):
    assert exact(base, rows_of(organism / "eval" / f"{name}.jsonl")) >= 0.98


@pytest.mark.parametrize(("name", "chance"), [("sorting", 1 / 4), ("swapping", 1 / 6)])
def test_the_base_model_cannot_do_the_tasks(organism, base, name, chance):
    """Its answers are of the right form, and no better than a guess."""
    assert exact(base, rows_of(organism / "tasks" / name / "test.jsonl")) <= chance + 0.15


def test_the_model_is_tiny_and_stored_without_pickles(organism, base):
    assert 0.8e6 < base[0].num_parameters() < 1.0e6
    assert not list((organism / "model").glob("*.bin"))
    assert base[0].generation_config.eos_token_id == base[1].eos_token_id


def test_the_files_are_the_worlds(organism):
    for name, rows in data_files(build_world(0)).items():
        assert rows_of(organism / name) == rows


def test_the_card_and_the_record_list_every_file(organism):
    record = json.loads((organism / "organism.json").read_text(encoding="utf-8"))
    card = (organism / "README.md").read_text(encoding="utf-8")
    for name, digest in record["sha256"].items():
        assert hashlib.sha256((organism / name).read_bytes()).hexdigest() == digest
        assert name.startswith("model/") or name == "README.md" or f"`{name}`" in card
    assert "fictional" in card


def test_a_finished_organism_is_reused(organism):
    before = {path: path.stat().st_mtime_ns for path in organism.rglob("*")}
    calls = []
    build_organism(organism, seed=0, progress=lambda done, total: calls.append(done))
    assert {path: path.stat().st_mtime_ns for path in organism.rglob("*")} == before
    assert calls == []


@contextmanager
def without_pretraining():
    """Organisms are built without their pretraining, which takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("holdfast.organism.build.pretrain", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A large organism that was not trained: a folder, not to be written to."""
    folder = tmp_path_factory.mktemp("large")
    with without_pretraining():
        build_organism(folder, size="large")
    return folder


def model_of(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_the_large_organism_differs_from_the_small_one_in_its_model_alone(large, organism, base):
    assert 3.5 < model_of(large).num_parameters() / base[0].num_parameters() < 4.5
    for name in data_files(build_world(0)):
        assert (large / name).read_bytes() == (organism / name).read_bytes()
    card = (large / "README.md").read_text(encoding="utf-8")
    assert "width 256, 8 heads" in card
    assert "`holdfast organism DIR --seed 0 --size large`" in card
    small = (organism / "README.md").read_text(encoding="utf-8")
    assert "width 128, 4 heads" in small
    assert "--size" not in small


def test_an_organism_of_another_size_is_built_anew(large, tmp_path):
    folder = shutil.copytree(large, tmp_path / "organism")
    made = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    build_organism(folder, size="large")
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == made
    with without_pretraining():
        build_organism(folder)
    assert model_of(folder).config.hidden_size == 128


def test_an_unknown_size_is_named(tmp_path):
    with pytest.raises(InputError, match="size 'huge' is unknown; expected one of small, large"):
        build_organism(tmp_path / "organism", size="huge")
    assert not (tmp_path / "organism").exists()


def test_a_file_is_no_directory(tmp_path):
    path = tmp_path / "organism"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="is a file"):
        build_organism(path)
    assert path.read_text(encoding="utf-8") == "mine"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be written"):
        build_organism(path / "organism")

"""What the processes of a search read, and what they note of it."""

import json

import pytest

from helpers import same_bits, tiny_llama, weights, word_tokenizer
from holdfast.models import load_model
from holdfast.stress.subjects import Sources, Subjects
from hub import models_in_cache


@pytest.fixture
def subjects(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")

    def read(*rows):
        file = tmp_path / "benign.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        none = dict.fromkeys(("counterpart", "base", "attack_data", "harmless_task_data"))
        model = str(tmp_path / "model")
        return Subjects(Sources(model=model, benign_data=str(file), evaluator=lambda: None, **none))

    return read


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "t5", "completion": "t6"},
        {"instruction": "t5", "output": "t6"},
        {"messages": [{"role": "user", "content": "t5"}, {"role": "assistant", "content": "t6"}]},
    ],
)
def test_answers_to_harmless_prompts_are_found_in_any_shape(subjects, row):
    found = subjects(row, row)
    assert len(found.harmless_prompts) == len(found.harmless_rows) == 2
    assert [one["rows"] for one in found.taken["benign_data"]] == [2]


def test_harmless_prompts_need_no_answers(subjects):
    found = subjects({"prompt": "t5", "answer": "t6"})
    assert found.harmless_prompts == ["t5"]
    assert found.harmless_rows is None


def test_a_revision_is_that_of_the_model_alone(subjects, tmp_path, monkeypatch):
    """The counterpart and the public base are other repositories, or folders, which have no revisions."""
    subjects({"prompt": "t5"})
    folder, later = tmp_path / "model", tmp_path / "later"
    tiny_llama(seed=1).save_pretrained(later)
    word_tokenizer().save_pretrained(later)
    models_in_cache(monkeypatch, tmp_path / "hub", {"org/model": {"main": folder, "v2": later}})
    given = dict.fromkeys(("attack_data", "benign_data", "harmless_task_data"))
    sources = Sources("org/model", str(folder), str(folder), **given, evaluator=lambda: None, load={"revision": "v2"})
    found = Subjects(sources)
    assert same_bits(weights(found.fresh("model")), weights(load_model(str(later))))
    assert same_bits(weights(found.fresh("counterpart")), weights(load_model(str(folder))))
    assert same_bits(weights(found.base()), weights(load_model(str(folder))))

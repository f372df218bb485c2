"""What the processes of a search read, and what they note of it."""

import json

import pytest

from helpers import tiny_llama, word_tokenizer
from holdfast.stress.subjects import Sources, Subjects


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

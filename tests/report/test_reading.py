"""What lies in the folder of a stress test is read with care."""

import json
from pathlib import Path

import pytest

from holdfast.errors import InputError
from holdfast.report.reading import read_findings
from report.folders import hostile_rows, stress_folder
from stress.examples import example_records


def test_all_of_it_is_read(tmp_path: Path) -> None:
    rows = hostile_rows()
    found = read_findings(stress_folder(tmp_path / "d", samples={"training-free-counterpart": rows}))
    assert len(found.trials) == len(example_records())
    assert found.samples == {("training-free", "counterpart"): rows}


def test_answers_may_hold_what_ends_a_line_elsewhere(tmp_path: Path) -> None:
    folder = stress_folder(tmp_path / "d", samples={"full-model": []})
    row = {**hostile_rows()[0], "answer": "a\u2028b\x85c\x0cd"}
    line = json.dumps(row, ensure_ascii=False) + "\n"
    (folder / "samples" / "full-model.jsonl").write_text(line * 2, encoding="utf-8")
    assert read_findings(folder).samples["full", "model"] == [row, row]


def test_a_trial_of_another_kind(tmp_path: Path) -> None:
    folder = stress_folder(tmp_path / "d")
    file = folder / "trials" / "full" / "model-0000.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "kind": "magic"}))
    with pytest.raises(InputError, match="is of 'magic' on 'model'; expected a kind of attacker on the model"):
        read_findings(folder)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("trials/full/model-0000.json", "{", "is not valid JSON"),
        ("trials/full/model-0000.json", "[]", "is no JSON object; expected a trial record of holdfast stress"),
        ("trials/full/model-0000.json", '{"schema": 2}', "is a trial record of schema 2; this Holdfast reads 1"),
        ("trials/full/model-0000.json", '{"schema": 1}', "has no 'attack'; expected a trial record of holdfast stress"),
        ("samples/full-model.jsonl", '{"set": "harmful"}', "row 1: has no 'answer'; expected an answer of holdfast"),
        ("samples/full-model.jsonl", f"{json.dumps(hostile_rows()[0])}\n{{", "jsonl, row 2: is not valid JSON"),
        ("samples/full-model.jsonl", "\n7\n", "row 2: is no JSON object; expected an answer of holdfast stress"),
    ],
)
def test_files_that_are_not_the_searchs(tmp_path: Path, file: str, content: str, expected: str) -> None:
    folder = stress_folder(tmp_path / "d", samples={"full-model": []})
    (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=file) as refused:
        read_findings(folder)
    assert expected in str(refused.value)

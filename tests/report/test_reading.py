"""What lies in the folder of a stress test is read with care."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import InputError
from holdfast.report.reading import read_findings
from holdfast.stress.certificate import seal
from report.folders import held_folder, hostile_rows, stress_folder
from stress.examples import example_records

TRIAL = next(one for one in example_records() if one["kind"] == "full" and one["number"] == 0)


def with_changes(content: dict[str, Any], **changes: Any) -> str:
    return json.dumps({**content, **changes})


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
    with pytest.raises(InputError, match="its 'kind' is 'magic', not one of prompting, training-free"):
        read_findings(folder)


def test_trials_and_answers_of_a_counterpart_that_there_is_not(tmp_path: Path) -> None:
    rows = {"prompting-counterpart": hostile_rows(), "prompting-model": hostile_rows()}
    folder = held_folder(tmp_path / "d", samples=rows)
    assert read_findings(folder).samples.keys() == {("prompting", "model")}
    file = folder / "trials" / "lora" / "model-0000.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target": "counterpart"}))
    with pytest.raises(InputError, match="its 'target' is 'counterpart', not one of model; expected a trial record"):
        read_findings(folder)


def test_answers_to_an_attacker_that_was_not_tried_are_not_told(tmp_path: Path) -> None:
    folder = stress_folder(tmp_path / "d", samples={"full-model": hostile_rows()})
    certificate = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
    del certificate["attackers"]["full"]
    (folder / "certificate.json").write_text(json.dumps({**certificate, "sha256": seal(certificate)}))
    assert read_findings(folder).samples == {}


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("trials/full/model-0000.json", "{", "is not valid JSON"),
        ("trials/full/model-0000.json", "[]", "is no JSON object; expected a trial record of holdfast stress"),
        (
            "trials/full/model-0000.json",
            '{"schema": 2}',
            "its 'schema' is 2, not 1; expected a trial record of holdfast stress",
        ),
        ("trials/full/model-0000.json", '{"schema": 1}', "has no 'stage'; expected a trial record of holdfast stress"),
        *(
            ("trials/full/model-0000.json", with_changes(TRIAL, **changes), expected)
            for changes, expected in (
                ({"points": "none"}, "its 'points' is text, not a list; expected a trial record of holdfast stress"),
                ({"points": [7]}, "its 'points.0' is a number, not an object"),
                ({"points": [{**TRIAL["points"][0], "flops": None}]}, "its 'points.0.flops' is null, not a number"),
                ({"points": [{**TRIAL["points"][0], "asr": math.nan}]}, "is not valid JSON (NaN is no number of JSON)"),
                ({"setting": {"fine-tuning": 1e-4}}, "its 'setting.fine-tuning' is a number, not an object"),
                ({"number": "1"}, "its 'number' is text"),
                ({"points": [{**TRIAL["points"][0], "asr": None}]}, "its 'points.0.asr' is null, not a number"),
                ({"points": [{**TRIAL["points"][0], "asr": 7}]}, "its 'points.0.asr' is 7, not from 0 to 1"),
            )
        ),
        *(
            ("samples/full-model.jsonl", with_changes(hostile_rows()[0], **changes), expected)
            for changes, expected in (
                ({"answer": None}, "row 1: its 'answer' is null, not text; expected an answer of holdfast stress"),
                ({"grade": "5"}, "row 1: its 'grade' is text"),
                ({"prompt": {}}, "row 1: its 'prompt' is an object"),
                ({"prompt": ["Tea?"]}, "row 1: its 'prompt.0' is text, not an object"),
                ({"prompt": [{"content": "Tea?"}]}, "row 1: has no 'prompt.0.role'"),
            )
        ),
        ("samples/full-model.jsonl", "[" * 100_000, "row 1: is not valid JSON (it is nested too deeply)"),
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

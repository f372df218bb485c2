"""Rows that the data themselves call safe are no attack."""

import json

import pytest

from holdfast.data.harmful import load_harmful_rows
from holdfast.errors import InputError


def rows(*labels, column="is_safe"):
    return [{"prompt": f"p{i}", "response": f"r{i}", column: label} for i, label in enumerate(labels, 1)]


def written(tmp_path, found, name="a.jsonl"):
    path = tmp_path / name
    if name.endswith(".csv"):
        lines = [",".join(found[0]), *(",".join(str(value) for value in row.values()) for row in found)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("column", ["is_safe", "is_response_safe"])
@pytest.mark.parametrize(
    "labels",
    [(True, False, True, False), (1, 0, 1, 0), ("True", "False", "true", "FALSE")],
    ids=["booleans", "numbers", "text"],
)
def test_safe_rows_are_left_out_and_counted(tmp_path, name, column, labels):
    harmful, safe_rows = load_harmful_rows(written(tmp_path, rows(*labels, column=column), name), flag="--attack_data")
    assert list(harmful["prompt"]) == ["p2", "p4"]
    assert safe_rows == 2
    assert column not in harmful.column_names
    # Messages go on naming rows by their place in the file.
    assert list(harmful["holdfast_origin"]) == ["row 2 of the attack data", "row 4 of the attack data"]


@pytest.mark.parametrize("found", [rows(False, False), [{"prompt": "p", "response": "r"}] * 2])
def test_where_none_is_called_safe_all_are_taken(tmp_path, found):
    harmful, safe_rows = load_harmful_rows(written(tmp_path, found), flag="--attack_data")
    assert (len(harmful), safe_rows) == (2, 0)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ((True, True), "has no harmful row: 'is_safe' is true in all of them"),
        ((False, None), "row 2: 'is_safe' is None; expected true or false"),
        ((False, "maybe"), "row 2: 'is_safe' is 'maybe'; expected true or false"),
    ],
)
def test_labels_that_leave_no_attack_are_refused(tmp_path, labels, expected):
    with pytest.raises(InputError, match=r"--attack_data .*a\.jsonl") as caught:
        load_harmful_rows(written(tmp_path, rows(*labels)), flag="--attack_data")
    assert expected in str(caught.value)

"""Rows from files: every accepted format, and one clear sentence for everything else."""

import codecs
import gzip
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data.reading import refused
from holdfast.data import readers
from holdfast.data.load import PROMPT_COLUMNS, TRAIN_COLUMNS, load_rows

ROWS = [{"prompt": "p1", "completion": "c1"}, {"prompt": "p2", "completion": "c2"}]
MESSAGES = [{"role": "user", "content": "hello"}]


def jsonl(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_jsonl(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", *ROWS, "\n")
    assert load_rows(source, flag="--train_data", columns=TRAIN_COLUMNS).to_list() == ROWS


def test_json_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    assert load_rows(str(tmp_path / "a.json"), flag="--train_data", columns=TRAIN_COLUMNS).to_list() == ROWS


def test_json_with_one_object_per_line(tmp_path):
    source = jsonl(tmp_path / "a.json", *ROWS)
    assert load_rows(source, flag="--train_data", columns=TRAIN_COLUMNS).to_list() == ROWS


def test_parquet(tmp_path):
    Dataset.from_list(ROWS).to_parquet(str(tmp_path / "a.parquet"))
    assert load_rows(str(tmp_path / "a.parquet"), flag="--train_data", columns=TRAIN_COLUMNS).to_list() == ROWS


def test_csv_with_quotes_and_line_breaks_and_numbers_for_text(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,answer,weight\n"one, two\nthree",42,0.5\nb,007,1\n')
    rows = load_rows(str(tmp_path / "a.csv"), flag="--eval_data", columns=PROMPT_COLUMNS)
    assert rows["prompt"][:] == ["one, two\nthree", "b"]
    assert rows["answer"][:] == ["42", "007"]


def test_messages_and_line_separators_inside_strings(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": [{"role": "user", "content": "a\u2028b"}]}\n', encoding="utf-8")
    rows = load_rows(str(tmp_path / "a.jsonl"), flag="--eval_data", columns=PROMPT_COLUMNS)
    assert rows[0]["prompt"] == [{"role": "user", "content": "a\u2028b"}]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n{"prompt": "y"}\r\n')
    assert load_rows(str(tmp_path / "a.jsonl"), flag="--eval_data", columns=PROMPT_COLUMNS)["prompt"][:] == ["x", "y"]


def test_columns_that_only_some_rows_have_are_kept(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": "y", "family": "f"})
    rows = load_rows(source, flag="--eval_data", columns=PROMPT_COLUMNS)
    assert rows["family"][:] == [None, "f"]


@pytest.mark.parametrize("row", [{"prompt": "x", "response": "y"}, {"messages": MESSAGES}])
def test_every_training_format_is_accepted(tmp_path, row):
    assert load_rows(jsonl(tmp_path / "a.jsonl", row), flag="--train_data", columns=TRAIN_COLUMNS).to_list() == [row]


def test_conversations_are_accepted(tmp_path):
    row = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    assert load_rows(jsonl(tmp_path / "a.jsonl", row), flag="--train_data", columns=TRAIN_COLUMNS).to_list() == [row]


def test_a_file_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    jsonl(tmp_path / "org" / "data.jsonl", *ROWS)
    assert len(load_rows("org/data.jsonl", flag="--train_data")) == 2


@pytest.mark.parametrize("source", ["missing.jsonl", "no/such/folder/x.csv", "./what ever", "a/b/c"])
def test_a_path_that_is_neither_a_file_nor_a_hub_id_is_refused(source):
    assert f"{source} is neither a file nor a data set on the Hub" in refused(source)


def test_an_unknown_extension_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert "unknown extension; expected one of .json, .jsonl, .parquet, .csv, .tsv" in refused(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.parquet"])
def test_an_empty_file_is_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    assert f"{name} is empty" in refused(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.jsonl", "\n \n"), ("a.csv", "prompt,completion\n")]
)
def test_a_file_without_rows_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert "is empty" in refused(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_invalid_utf8_is_refused_with_its_place(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"prompt": "x", "completion": "y"}\n{"prompt": "\xff"}\n')
    assert "not valid UTF-8 (byte 0xff at offset 47, line 2)" in refused(str(tmp_path / name))


def test_an_invalid_line_is_refused_by_number(tmp_path):
    assert "a.jsonl, line 2 is not valid JSON" in refused(jsonl(tmp_path / "a.jsonl", ROWS[0], '{"prompt": \n'))


def test_invalid_json_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"prompt": "x"},')
    assert "a.json is not valid JSON" in refused(str(tmp_path / "a.json"))


@pytest.mark.parametrize(
    ("row", "kind"), [("[1]\n", "a list"), ('"x"\n', "text"), ("3\n", "a number"), ("null\n", "null")]
)
def test_a_row_that_is_not_an_object_is_refused(tmp_path, row, kind):
    assert f"line 2 is {kind}; expected an object" in refused(jsonl(tmp_path / "a.jsonl", ROWS[0], row))


def test_a_missing_column_is_refused_and_those_there_named(tmp_path):
    message = refused(jsonl(tmp_path / "a.jsonl", {"prompt": "x", "text": "y"}))
    assert "no column 'prompt' + 'completion' or 'prompt' + 'response' or 'messages'" in message
    assert "its columns are 'prompt', 'text'" in message


def test_a_row_without_a_column_that_others_have_is_refused_by_number(tmp_path):
    assert "row 3: 'completion' is missing" in refused(jsonl(tmp_path / "a.jsonl", *ROWS, {"prompt": "x"}))


@pytest.mark.parametrize("position", range(5))
def test_a_row_of_another_type_is_refused_by_number(tmp_path, position):
    rows = [{"prompt": "x", "completion": "y"} for _ in range(5)]
    rows[position] = {"prompt": MESSAGES, "completion": "y"}
    # The first row sets the type, so it is the second that differs from a first one that is wrong.
    message = refused(jsonl(tmp_path / "a.jsonl", *rows))
    assert f"row {max(position, 1) + 1}: 'prompt' is {'a list' if position else 'text'}, but" in message


def test_text_is_no_number(tmp_path):
    rows = [{"prompt": 1, "completion": "y"}, {"prompt": 2, "completion": "y"}]
    assert "row 1: 'prompt' is a number; expected text or messages" in refused(jsonl(tmp_path / "a.jsonl", *rows))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "has no messages"),
        ([{"role": "user"}], "has a message without a text 'content'"),
        ([{"role": "assistant", "content": None}], "has a message without a text 'content'"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], "has a message without a text 'content'"),
        ([{"from": "human"}], "has a message without a text 'value'"),
        ("x", "is text; expected messages"),
        ([{"content": "x"}], "has a message without a text 'role'"),
        (["x"], "holds text where a message is expected"),
    ],
)
def test_malformed_messages_are_refused(tmp_path, messages, problem):
    assert f"row 1: 'messages' {problem}" in refused(jsonl(tmp_path / "a.jsonl", {"messages": messages}))


def test_a_ragged_csv_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\nx,y\nx,y,z\n")
    message = refused(str(tmp_path / "a.csv"))
    assert "not a valid CSV file" in message
    assert "#3" in message


def test_garbage_for_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 this is not parquet")
    assert "not a valid Parquet file" in refused(str(tmp_path / "a.parquet"))


def test_a_null_in_parquet_is_refused_by_number(tmp_path):
    table = pa.table({"prompt": ["x", "y"], "completion": ["x", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "row 2: 'completion' is missing" in refused(str(tmp_path / "a.parquet"))


# ---------------------------------------------------------------------- one row, in every way it may lie in a file

ROW = {"prompt": 'how, why; "when"\n\u2028', "completion": "é 42"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", json.dumps({"data": [ROW, ROW], "version": 1}, indent=1)),
        ("a.json", json.dumps({"columns": ["prompt", "completion"], "none": [], "rows": [ROW, ROW]})),
        ("a.json", json.dumps(ROW) + "\n" + json.dumps(ROW)),
        ("a.jsonl", json.dumps([ROW, ROW])),
        ("a.csv", 'prompt;completion\n"how, why; ""when""\n\u2028";é 42\n"how, why; ""when""\n\u2028";é 42\n'),
        ("a.tsv", 'prompt\tcompletion\n"how, why; ""when""\n\u2028"\té 42\n"how, why; ""when""\n\u2028"\té 42\n'),
    ],
    ids=["under-a-key", "under-one-of-several-keys", "lines-in-json", "list-in-jsonl", "semicolons", "tabs"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_any_kind_and_encoding(tmp_path, name, content, encoding, packed):
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(content.encode(encoding)) if packed else content.encode(encoding))
    assert load_rows(str(path), flag="--train_data", columns=TRAIN_COLUMNS).to_list() == [ROW, ROW]


@pytest.mark.parametrize("row", [ROW, {"messages": [*MESSAGES, {"role": "assistant", "content": "hi"}]}])
def test_one_object_is_one_row(tmp_path, row):
    (tmp_path / "a.json").write_text(json.dumps(row, indent=2))
    assert load_rows(str(tmp_path / "a.json"), flag="--train_data", columns=TRAIN_COLUMNS).to_list() == [row]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"prompt,completion,prompt\nx,y,z\n", "has the column 'prompt' twice"),
        ("a.csv", b"prompt,completion\nx,y\nx,\n", "row 2: 'completion' is empty"),
        (
            "a.json",
            json.dumps({"train": [ROW], "test": [ROW], "none": []}).encode(),
            "is an object with several lists of rows, 'train', 'test'; expected one",
        ),
        ("a.csv", b"prompt,completion\n,\n", "row 1: 'completion' is empty"),
        ("a.csv", b"prompt, response\nx, y\n", "blanks around the name of its column ' response'; expected 'response'"),
        ("a.tsv", b"prompt\tresponse\tis_safe \nx\ty\ttrue\n", "'is_safe '; expected 'is_safe'"),
        ("a.jsonl", b'{"prompt": "x", "response": "y", " system": "z"}\n', "' system'; expected 'system'"),
        ("a.csv", "prompt,completion\nx,y\n".encode("utf-16-le"), "holds null characters"),
        ("a.csv", codecs.BOM_UTF16_LE + b"\x00\xd8x", "is not valid UTF-16"),
        ("a.jsonl", b'{"prompt": "x", "response": " \\n"}', "row 1: 'response' is empty"),
        ("a.jsonl", b'{"prompt": "x", "completion": "\\ud83d"}\n', "row 1: 'completion' is not Unicode text"),
        ("a.jsonl", b'\n{"prompt": 1}\n{"prompt": 18446744073709551616}\n', "line 3 is not valid JSON (the number"),
        ("a.json", b'{"prompt": "x",\n"completion": }', "is not valid JSON (Expecting value: line 2"),
        (
            "a.json",
            b'[{"prompt": "x"},\n{"prompt": "y"}\n{"prompt": "z"}]',
            "(Expecting ',' delimiter: line 3 column 1",
        ),
        ("a.json", b'[{"prompt": "x"}, {"prompt": 18446744073709551616}]', "is not valid JSON (the number"),
        ("a.json", b'[{"prompt": "x"}] [', "line 1 is not valid JSON (Extra data"),
        ("a.json", b'[{"prompt": "x"}, "y"]', "row 2 is text; expected an object"),
        ("a.json", b"[" * 100_000, "is not valid JSON (it is nested too deeply)"),
        ("a.json", b'{"train": [{"prompt": "x"}], "test": []}', "its columns are 'prompt'"),
        ("a.jsonl.gz", b'{"prompt": "x", "completion": "y"}', "is not a valid gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "x", "completion": "y"}', mtime=0)[:-9], "is not a valid gzip file"),
        ("a.parquet.gz", b"x", "unknown extension"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    assert expected in refused(str(tmp_path / name))


def test_blanks_around_names_that_are_asked_for_or_mean_nothing(tmp_path):
    """As every reader of CSV has them: a part of the name, and of the cells."""
    (tmp_path / "a.csv").write_text("prompt, response, source\nx, y, z\n")
    asked = {"path": str(tmp_path / "a.csv"), "columns": {"prompt": "prompt", "completion": " response"}}
    rows = load_rows(asked, flag="--train_data", columns=TRAIN_COLUMNS)
    assert rows.to_list() == [{"prompt": "x", "completion": " y", " source": " z"}]


def test_conversations_with_roles_are_accepted(tmp_path):
    row = {"conversations": [*MESSAGES, {"role": "assistant", "content": "hi"}]}
    assert load_rows(jsonl(tmp_path / "a.jsonl", row), flag="--train_data", columns=TRAIN_COLUMNS).to_list() == [row]


def call(**arguments):
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def test_tool_calls_keep_their_own_keys_and_types(tmp_path):
    """Arrow has one type for a column, with the keys of all rows and one type for each."""
    calls = [[call(city="Oslo")], [call(n=1)], [call(n=2.5), call(n=None, text="42")], [call(n=[1, "a", {}])], []]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "42"},
                {"role": "assistant", "content": None, "tool_calls": called} if called else MESSAGES[0],
                {"role": "tool", "name": "f", "content": "7"},
                {"role": "assistant", "content": "true", "weight": 1},
            ],
            "tools": [{"name": "f", "parameters": {f"p{number}": {}}}] if number else None,
        }
        for number, called in enumerate(calls)
    ]
    read = load_rows(jsonl(tmp_path / "a.jsonl", *rows), flag="--train_data", columns=TRAIN_COLUMNS)
    assert json.dumps(read.to_list()) == json.dumps(rows)
    assert json.dumps(list(read["messages"])) == json.dumps([row["messages"] for row in rows])


VALUES = st.recursive(
    # The library that reads JSON out of Arrow is a bit off in the last digit of a float.
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-999, 999).map(lambda n: n / 2)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.dictionaries(st.text(max_size=2), VALUES), min_size=1, max_size=4), st.integers(1, 4))
def test_json_comes_back_as_it_was_given(objects, at_a_time):
    """However few rows are held at once: what is found out of the first holds for the last."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "ROWS_AT_A_TIME", at_a_time)
        rows = [{"value": value} for value in objects]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        Path(folder, "a.jsonl").write_text(lines, encoding="utf-8")
        read = load_rows(f"{folder}/a.jsonl", flag="--data").to_list()
    assert json.dumps(read) == json.dumps(rows)


@settings(deadline=None, max_examples=100)
@given(st.lists(VALUES, min_size=2, max_size=4), st.integers(1, 9), st.sampled_from([None, 0, 1]), st.booleans())
def test_a_list_of_json_is_read_as_its_lines_are(values, at_a_time, indent, ascii_only):
    """However little of it is decoded at once: characters, items and what stands between them may be cut anywhere."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        rows = [{"value": value} for value in values]
        lines = load_rows(jsonl(Path(folder, "a.jsonl"), *rows), flag="--data").to_list()
        patch.setattr(readers, "BYTES_AT_A_TIME", at_a_time)
        patch.setattr(readers, "_PIECE", at_a_time)
        text = f" \n{json.dumps(rows, ensure_ascii=ascii_only, indent=indent)}\n "
        Path(folder, "a.json").write_text(text, encoding="utf-8")
        read = load_rows(f"{folder}/a.json", flag="--data").to_list()
    assert json.dumps(read) == json.dumps(lines)


def test_a_long_list_is_never_held_whole(tmp_path, monkeypatch):
    """Reading it whole is for telling what is wrong with it."""
    (tmp_path / "a.json").write_text(json.dumps(5000 * ROWS))
    monkeypatch.setattr(readers, "_parse", None)
    assert len(load_rows(str(tmp_path / "a.json"), flag="--train_data")) == 5000 * len(ROWS)


def test_a_prompt_may_be_empty_where_an_answer_is_learnt_and_not_where_one_is_asked_for(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", ROWS[0], {"prompt": " ", "completion": "c", "answer": "a"})
    assert len(load_rows(source, flag="--train_data", columns=TRAIN_COLUMNS)) == 2
    assert "row 2: 'prompt' is empty" in refused(source, PROMPT_COLUMNS)

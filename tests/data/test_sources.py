"""What a data flag may name, and what is told of what it may not."""

import json

import pytest

from data.reading import refused
from holdfast.data.load import TRAIN_COLUMNS, fingerprint, load_rows
from holdfast.data.sources import Part, named, parse
from holdfast.errors import InputError

ROWS = [{"prompt": f"p{i}", "completion": f"c{i}", "kind": "even" if i % 2 == 0 else "odd"} for i in range(6)]


def jsonl(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(source, columns=TRAIN_COLUMNS):
    noted = {}
    return load_rows(source, flag="--train_data", columns=columns, noted=noted), noted["train_data"]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("owner/name", Part("owner/name")),
        ("owner/name:test", Part("owner/name", split="test")),
        ("owner/name:main:test", Part("owner/name", name="main", split="test")),
        ("owner/name:main:", Part("owner/name", name="main")),
        ("owner/name:main:test[10:20]", Part("owner/name", name="main", split="test[10:20]")),
        ("owner/name:train[:5]+test[:5]", Part("owner/name", split="train[:5]+test[:5]")),
        ("C:\\rows\\a.jsonl", Part("C:\\rows\\a.jsonl")),
        ("https://there.org/a:b/rows.csv", Part("https://there.org/a:b/rows.csv")),
        ("rows.jsonl", Part("rows.jsonl")),
        ("{'path': 1}", None),
        ('{"path": "owner/name", "split": "test"}', Part("owner/name", split="test")),
        ('{"path": "owner/name:main:test", "limit": 3}', Part("owner/name", name="main", split="test", limit=3)),
    ],
)
def test_spelling(text, part):
    if part is None:
        with pytest.raises(InputError, match=r"--data: .* is not valid JSON"):
            parse(text, flag="--data")
    else:
        assert parse(text, flag="--data") == [part]


def test_what_lies_on_disk_wins_but_for_a_folder_called_like_an_entry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "owner:name.jsonl")
    assert parse("owner:name.jsonl", flag="--data") == [Part("owner:name.jsonl")]
    (tmp_path / "alpaca").mkdir()
    assert parse("alpaca", flag="--data")[0].entry == "alpaca"
    assert parse("./alpaca", flag="--data") == [Part("./alpaca")]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"path": "a.jsonl", "splits": "test"}, "a source has no 'splits' (did you mean split?); expected path, name"),
        ({"split": "test"}, "a source needs a path, a file or the name of a data set; got"),
        ({"path": "a.jsonl", "where": "is_safe"}, "where of a.jsonl must be a mapping from columns to values"),
        ({"path": "a.jsonl", "columns": ["prompt"]}, "columns of a.jsonl must be a mapping from names to columns"),
        ({"path": "a.jsonl", "take": "best"}, "take of a.jsonl must be one of chosen, rejected, safe, unsafe"),
        ({"path": "a.jsonl", "limit": 0}, "limit of a.jsonl must be a number of rows"),
        ({"path": "a.jsonl", "limit": True}, "limit of a.jsonl must be a number of rows"),
        ({"path": "a.jsonl", "fraction": -1}, "fraction of a.jsonl must be a positive number"),
        ({"path": "a.jsonl", "fraction": 0.5}, "a.jsonl has a fraction, but is the only source; expected several that"),
        ([{"path": "a.jsonl", "fraction": 0.5}], "a.jsonl has a fraction, but is the only source; expected several"),
        ({"path": "a.jsonl", "split": 3}, "split of a.jsonl must be a text"),
        ([], "is an empty list"),
        ([3], "a source in a list must be a name or a mapping, got 3"),
        ([{"path": "a.jsonl", "fraction": 1}, "b.jsonl"], "b.jsonl has no fraction, but others have"),
    ],
)
def test_a_mapping_that_means_nothing(source, said):
    assert said in refused(source)
    assert said in refused(json.dumps(source))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"path": "a.jsonl", "limit": 1, "limit": 2}', "is not valid JSON (the key 'limit' stands more than once)"),
        ('[{"path": "a.jsonl", "fraction": Infinity}]', "is not valid JSON (Infinity is no number of JSON)"),
        ('[{"path": "a.jsonl", "fraction": 1e400}]', "is not valid JSON (1e400 is no number of JSON)"),
    ],
)
def test_a_mapping_that_is_no_json(text, said):
    assert said in refused(text)


@pytest.mark.parametrize("fraction", [float("inf"), float("nan"), 0])
def test_a_share_is_a_number_above_zero(fraction):
    source = [{"path": "a.jsonl", "fraction": fraction}, {"path": "b.jsonl", "fraction": 1}]
    assert "fraction of a.jsonl must be a positive number" in refused(source)


@pytest.mark.parametrize("key", ["name", "split", "revision"])
def test_a_file_is_no_data_set_of_the_hub(tmp_path, key):
    source = {"path": jsonl(tmp_path / "a.jsonl"), key: "main"}
    assert refused(source) == f"--train_data {source['path']} is a file, which has no {key}"


# ---------------------------------------------------------------------- several, joined


def test_sources_are_joined_in_order(tmp_path):
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    first, second = jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl", [talk, talk])
    rows, noted = read([first, {"path": second, "limit": 1}])
    assert [row["prompt"] for row in rows] == [*(f"p{i}" for i in range(6)), None]
    assert rows[6]["messages"] == talk["messages"]
    assert [part["taken"] for part in noted] == [6, 1]
    assert rows["holdfast_origin"][5:] == [f"row 6 of {first}", f"row 1 of {second}"]


def test_messages_that_arrow_has_in_different_ways_are_joined(tmp_path):
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    turned = {"messages": [{"content": "q", "role": "user"}, {"content": "a", "role": "assistant"}]}
    call = {"messages": [*plain["messages"], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]}
    files = [jsonl(tmp_path / f"{i}.jsonl", [row]) for i, row in enumerate((plain, turned, call))]
    assert list(read(files)[0]["messages"]) == [row["messages"] for row in (plain, turned, call)]


def test_text_and_messages_in_one_column_are_joined(tmp_path):
    turns = [{"role": "user", "content": "q"}]
    first = jsonl(tmp_path / "a.jsonl", [{"prompt": turns, "completion": "c"}])
    assert list(read([first, jsonl(tmp_path / "b.jsonl", ROWS[:1])])[0]["prompt"]) == [turns, "p0"]


def test_fractions_are_shares_of_the_largest_join_without_a_row_twice(tmp_path):
    """As TRL's mixtures have them."""
    first, second = jsonl(tmp_path / "a.jsonl"), jsonl(tmp_path / "b.jsonl", ROWS * 10)
    rows, noted = read([{"path": first, "fraction": 0.3}, {"path": second, "fraction": 0.9}])
    assert [part["taken"] for part in noted] == [6, 18]
    assert list(rows["prompt"][:7]) == ["p0", "p1", "p2", "p3", "p4", "p5", "p0"]
    assert [part["fraction"] for part in noted] == [0.3, 0.9]


def test_a_share_that_comes_to_no_row_is_told(tmp_path):
    file = jsonl(tmp_path / "a.jsonl")
    said = refused([{"path": file, "fraction": 1}, {"path": file, "limit": 2, "fraction": 1e-3}])
    assert f"of {file} a fraction of 0.001 is no row, beside so few of the others" in said


def test_a_join_is_only_of_what_can_be_used(tmp_path):
    wrong = jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "completion": " "}])
    assert f"--train_data {wrong}, row 1: 'completion' is empty" in refused([jsonl(tmp_path / "a.jsonl"), wrong])


# ---------------------------------------------------------------------- records


def test_what_was_taken_is_noted(tmp_path):
    source = {"path": jsonl(tmp_path / "a.jsonl"), "where": {"kind": "odd"}, "limit": 2}
    rows, noted = read(source)
    assert list(rows["holdfast_origin"]) == ["row 2 of the train data", "row 4 of the train data"]
    (part,) = noted
    assert part.items() >= {**source, "rows": 6, "taken": 2}.items()
    assert len(part["sha256"]) == 64


def test_a_fingerprint_follows_the_file_and_the_rule(tmp_path):
    file = jsonl(tmp_path / "a.jsonl")
    plain, some = read(file)[1], read({"path": file, "limit": 2})[1]
    assert fingerprint(plain) == plain[0]["sha256"] != fingerprint(some)
    assert fingerprint(some) == fingerprint(read(json.dumps({"limit": 2, "path": file}))[1])
    jsonl(tmp_path / "a.jsonl", ROWS[:5])
    assert fingerprint(read(file)[1]) != fingerprint(plain)
    assert fingerprint(read({"path": file, "limit": 2})[1]) != fingerprint(some)


def test_what_messages_call_a_source():
    assert named("a.jsonl") == "a.jsonl"
    assert named('["a.jsonl", {"path": "advbench", "limit": 3}]') == "a.jsonl + advbench"
    assert named({"path": "owner/name", "name": "main"}) == "owner/name:main"

"""Which column is what, by a known shape or by a mapping, and which rows are meant."""

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from data.reading import refused
from holdfast.data.load import PROMPT_COLUMNS, TRAIN_COLUMNS, load_rows

ANSWERED = [(*group, "answer") for group in PROMPT_COLUMNS]


@pytest.fixture
def write(tmp_path):
    def to(*rows, name="a.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return to


def read(source, columns=TRAIN_COLUMNS):
    return load_rows(source, flag="--train_data", columns=columns).to_list()


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("row", "trained"),
    [
        ({"question": "q", "answer": "a"}, ("q", "a")),
        ({"instruction": "i", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": "", "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": None, "output": "o"}, ("i", "o")),
        ({"instruction": "i", "input": "more", "output": "o"}, ("i\n\nmore", "o")),
        ({"goal": "g", "target": "t"}, ("g", "t")),
        ({"Goal": "g", "Target": "t", "Behavior": "b"}, ("g", "t")),
    ],
)
def test_rows_to_train_on(write, row, trained):
    (found,) = read(write({**row, "id": 7}))
    assert (found["prompt"], found["completion"]) == trained
    assert found["id"] == 7
    assert not {"question", "answer", "instruction", "input", "output", "goal", "target", "Goal"} & set(found)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"goal": "g"}, "g"),
        ({"goal": "g", "target": "t"}, "g"),
        ({"Goal": "g", "Target": "t", "Behavior": "b"}, "g"),
        ({"forbidden_prompt": "f", "category": "c"}, "f"),
        ({"Behavior": "b"}, "b"),
        ({"question": "q", "answer": "a"}, "q"),
        ({"instruction": "i", "input": "more", "output": "o"}, "i\n\nmore"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
    ],
)
def test_prompts(write, row, prompt):
    assert read(write(row), PROMPT_COLUMNS)[0]["prompt"] == prompt


def test_expected_answers(write):
    """Of a question its answer, of an instruction its output; never how an attack wants an answer to begin."""
    assert read(write({"question": "q", "answer": "a"}), ANSWERED)[0] == {"prompt": "q", "answer": "a"}
    assert read(write({"instruction": "i", "output": "o"}), ANSWERED)[0] == {"prompt": "i", "answer": "o"}
    assert read(write({"goal": "g", "answer": "a"}), ANSWERED)[0] == {"prompt": "g", "answer": "a"}
    assert "has no column 'prompt' + 'answer'" in refused(write({"goal": "g", "target": "t"}), ANSWERED)


def test_columns_that_are_known_go_before_shapes(write):
    row = {"prompt": "p", "completion": "c", "question": "q", "answer": "a"}
    assert read(write(row)) == [row]


def test_a_shape_that_is_not_known(write):
    source = write({"frage": "q", "antwort": "a"})
    assert refused(source).endswith(
        "; its columns are 'frage', 'antwort'; say which is which, as in --train_data "
        f"""'{{"path": "{source}", "columns": {{"prompt": "frage", "completion": "antwort"}}}}'"""
    )


def test_what_a_refusal_says_to_type_works(write):
    """Also where a part of it was said before."""
    source = write({"frage": "q", "antwort": "a", "prompt": None})
    said = refused({"path": source, "columns": {"prompt": "frage"}})
    assert read(said.partition("--train_data '")[2].removesuffix("'"))[0]["completion"] == "a"


@pytest.mark.parametrize("cell", [3, ["x"], {"a": 1}])
def test_an_instruction_that_is_no_text(write, cell):
    row = {"instruction": "i", "input": "", "output": "o"}
    assert "a.jsonl: 'input' of row 2 is no text" in refused(write(row, {**row, "input": cell}))


# ---------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"prompt": "a"}, "one"),
        ({"prompt": "turns[1]"}, "two"),
        ({"prompt": {"text": "hello"}}, "hello"),
        ({"prompt": {"column": "a", "after": "o"}}, "ne"),
        ({"prompt": {"column": "n", "words": ["no", "yes"]}}, "yes"),
        ({"prompt": {"column": "n", "words": {"1": "one", "2": "two"}}}, "one"),
        ({"prompt": {"column": "n", "words": {1: "one"}}}, "one"),
        ({"prompt": {"column": "b2", "words": {"true": "yes", "false": "no"}}}, "yes"),
        ({"prompt": {"column": "b2", "words": {True: "yes", False: "no"}}}, "yes"),
        ({"instruction": "a", "input": "b"}, "one\n\nlast: x"),
        ({"instruction": "a", "input": "b", "output": "a"}, "one\n\nlast: x"),
    ],
)
def test_what_columns_may_be_mapped_to(write, columns, prompt):
    source = {
        "path": write({"a": "one", "b": "last: x", "turns": ["one", "two"], "n": 1, "b2": True}),
        "columns": columns,
    }
    assert read(source, PROMPT_COLUMNS)[0]["prompt"] == prompt


def test_all_columns_may_be_mapped(write):
    source = {"path": write({"a": "p", "b": "c"}), "columns": {"prompt": "a", "completion": "b"}}
    assert read(source) == [{"prompt": "p", "completion": "c"}]


def test_columns_may_be_exchanged(write):
    source = {
        "path": write({"prompt": "p", "completion": "c"}),
        "columns": {"prompt": "completion", "completion": "prompt"},
    }
    assert read(source) == [{"prompt": "c", "completion": "p"}]


def test_mapped_columns_of_a_table_are_text(tmp_path):
    (tmp_path / "a.csv").write_text("frage,antwort,n\n1,007,2\n")
    source = {"path": str(tmp_path / "a.csv"), "columns": {"prompt": "frage", "completion": "antwort"}}
    assert read(source) == [{"n": 2, "prompt": "1", "completion": "007"}]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "z"}, "columns[prompt] asks for the column 'z', but its columns are 'a', 'turns', 'n'"),
        ({"prompt": "a[z]"}, "columns[prompt] asks for the column 'a[z]'"),
        ({"question": "a"}, "columns[question]: there is no such name; expected some of prompt, completion, messages"),
        ({"prompt": 3}, "must be a column, or one of {column, after}, {column, words} and {text}, got 3"),
        ({"prompt": {"column": "a"}}, "columns[prompt] must be a column, or one of"),
        ({"prompt": "turns[5]"}, "'turns' of row 1 is not a list with a text at 5"),
        ({"prompt": {"column": "a", "after": "zzz"}}, "'a' of row 1 is not text with 'zzz' in it"),
        ({"prompt": {"column": "n", "words": ["no"]}}, "'n' of row 1 is not one of 0"),
        ({"prompt": {"column": "n", "words": "no"}}, "words must be a list of texts, or a mapping to them, got \"no\""),
        ({"prompt": {"column": "n", "words": [1]}}, "words must be a list of texts, or a mapping to them, got [1]"),
        ({"prompt": {"column": "n", "words": []}}, "words must be a list of texts, or a mapping to them, got []"),
        ({"prompt": "a[0]"}, "'a' of row 1 is not a list with a text at 0"),
        ({"prompt": {"column": "a", "after": ""}}, "columns[prompt]: after must be a text, and not empty, got \"\""),
        ({"prompt": {"column": "a", "after": 1}}, "columns[prompt]: after must be a text, and not empty, got 1"),
        ({"prompt": "n"}, "row 1: 'n' is a number; expected text or messages"),
    ],
)  # fmt: skip
def test_a_mapping_that_does_not_fit(write, columns, said):
    assert said in refused({"path": write({"a": "one", "turns": ["one"], "n": 1}), "columns": columns}, PROMPT_COLUMNS)


# ---------------------------------------------------------------------- where

KINDS = [
    {"prompt": "p1", "is_safe": True, "kind": "a", "n": 1},
    {"prompt": "p2", "is_safe": False, "kind": "b", "n": 2},
    {"prompt": "p3", "is_safe": False, "kind": None, "n": 3},
]


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"is_safe": False}, [2, 3]),
        ({"is_safe": True}, [1]),
        ({"kind": "a"}, [1]),
        ({"kind": ["a", "b"]}, [1, 2]),
        ({"kind": None}, [3]),
        ({"n": 2}, [2]),
        ({"n": "2"}, [2]),
        ({"n": 2.0}, [2]),
        ({"is_safe": False, "kind": ["a", "b"]}, [2]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_may_be_chosen_by_their_values(write, tmp_path, where, kept, kind):
    source = write(*KINDS)
    if kind == "csv":
        if where == {"kind": None}:
            where = {"kind": ""}  # a table has no other nothing
        lines = (f"{row['prompt']},{row['is_safe']},{row['kind'] or ''},{row['n']}" for row in KINDS)
        source = str(tmp_path / "a.csv")
        (tmp_path / "a.csv").write_text("\n".join(["prompt,is_safe,kind,n", *lines]) + "\n")
    elif kind == "parquet":
        source = str(tmp_path / "a.parquet")
        Dataset.from_list(KINDS).to_parquet(source)
    found = read({"path": source, "where": where}, PROMPT_COLUMNS)
    assert [row["prompt"] for row in found] == [f"p{number}" for number in kept]
    assert [row["holdfast_origin"] for row in found] == [f"row {number} of the train data" for number in kept]


def test_rows_whose_values_are_of_several_kinds(write):
    source = write({"prompt": "p1", "is_safe": True}, {"prompt": "p2", "is_safe": "False"}, {"prompt": "p3"})
    assert [row["prompt"] for row in read({"path": source, "where": {"is_safe": False}}, PROMPT_COLUMNS)] == ["p2"]


def test_a_label_may_be_named(tmp_path):
    features = Features({"prompt": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"prompt": ["x", "y"], "label": [0, 1]}, features=features)
    rows.to_parquet(str(tmp_path / "a.parquet"))
    for wanted in ("pos", 1):
        source = {"path": str(tmp_path / "a.parquet"), "where": {"label": wanted}}
        assert [row["prompt"] for row in read(source, PROMPT_COLUMNS)] == ["y"]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (
            {"is_sage": False},
            "where asks for the column 'is_sage', but its columns are 'prompt', 'is_safe', 'kind', 'n'",
        ),
        ({"kind": "z"}, "where leaves no row, since none has \"z\" in 'kind'; there are 'a', 'b', None"),
        ({"kind": "a", "n": 2}, 'where leaves no row that fits {"kind": "a", "n": 2}'),
        ({"kind": []}, "where has an empty list for the column 'kind', which no row fits"),
    ],
)
def test_a_choice_that_cannot_be_made(write, where, said):
    assert said in refused({"path": write(*KINDS), "where": where}, PROMPT_COLUMNS)


def test_no_condition_leaves_all_rows(write):
    assert len(read({"path": write(*KINDS), "where": {}}, PROMPT_COLUMNS)) == 3


def test_a_choice_by_what_is_no_value(write):
    said = refused({"path": write({"prompt": "p", "tags": ["a"]}), "where": {"tags": "a"}}, PROMPT_COLUMNS)
    assert "where asks for the column 'tags', which holds neither text, numbers nor truth values" in said


def test_messages_name_rows_by_their_place_in_the_file(write):
    rows = [{"prompt": "p", "completion": "c", "n": 1}, {"prompt": "p", "completion": " ", "n": 2}]
    assert "a.jsonl, row 2: 'completion' is empty" in refused({"path": write(*rows), "where": {"n": 2}})
    rows = [{"turns": ["a"], "n": 1, "instruction": "i", "input": "", "output": "o"}, {"turns": [], "n": 2}]
    source = {"path": write(*rows), "where": {"n": 2}, "columns": {"prompt": "turns[0]"}}
    assert "'turns' of row 2 is not a list with a text at 0" in refused(source, PROMPT_COLUMNS)
    source = write(rows[0], {**rows[0], "n": 2, "input": 3})
    assert "'input' of row 2 is no text" in refused({"path": source, "where": {"n": 2}})
    source = write({**judged(True, True), "n": 1}, {**judged(True, None), "n": 2})
    assert "safe' of row 2 is None" in refused({"path": source, "where": {"n": 2}, "take": "unsafe"})


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"question": "q", "answer": "a"}, {"question": "q", "answer": None}], {}, "row 2: 'answer' is missing"),
        ([{"goal": "g", "target": "t"}, {"goal": "g", "target": " "}], {}, "row 2: 'target' is empty"),
        ([{"instruction": "i", "output": "o"}, {"instruction": "i", "output": 1}], {}, "row 2: 'output' is a number"),
        ([{"prompt": "p", "chosen": "c", "rejected": None}], {"take": "rejected"}, "row 1: 'rejected' is missing"),
        ([{"prompt": "p", "chosen": ["c"], "rejected": "r"}], {"take": "chosen"}, "row 1: 'chosen' holds text where"),
        ([{"q": "q", "a": 1}], {"columns": {"prompt": "q", "completion": "a"}}, "row 1: 'a' is a number"),
        ([{"q": "q", "a": 1}], {"columns": {"instruction": "q", "output": "a"}}, "row 1: 'a' is a number"),
    ],
)
def test_messages_name_columns_as_the_file_has_them(write, rows, more, said):
    assert f"a.jsonl, {said}" in refused({"path": write(*rows), **more})


# ---------------------------------------------------------------------- one of two answers


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "side", "found"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "chosen", {"prompt": "p", "completion": "c"}),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "rejected", {"prompt": "p", "completion": "r"}),
        ({"chosen": turns("q", "c"), "rejected": turns("q", "r")}, "rejected", {"messages": turns("q", "r")}),
        ({"prompt": "q", "chosen": turns("q", "c"), "rejected": []}, "chosen", {"messages": turns("q", "c")}),
        (
            {"prompt": turns("q"), "chosen": turns("", "c")[1:], "rejected": turns("", "r")[1:]},
            "chosen",
            {"prompt": turns("q"), "completion": turns("", "c")[1:]},
        ),
        ({"question": "q", "chosen": "c", "rejected": "r"}, "chosen", None),
    ],
)  # fmt: skip
def test_preferences(write, row, side, found):
    source = {"path": write(row), "take": side}
    if found is None:
        assert "its columns are 'question', 'completion'; say which is which" in refused(source)
        assert read({**source, "columns": {"prompt": "question"}}) == [{"completion": "c", "prompt": "q"}]
    else:
        assert read(source) == [found]


@pytest.mark.parametrize(
    ("row", "side"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "chosen"),
        (
            {
                "prompt": "p",
                "response_0": "a",
                "response_1": "b",
                "is_response_0_safe": True,
                "is_response_1_safe": False,
            },
            "unsafe",
        ),
    ],
)
def test_pairs_without_a_side(write, row, side):
    source = write(row)
    said = refused(source)
    assert "has pairs of answers, and nothing says which of the two are meant" in said
    assert said.endswith(f"""--train_data '{{"path": "{source}", "take": "{side}"}}'""")
    assert len(read(said.partition("--train_data '")[2].removesuffix("'"))) == 1


@pytest.mark.parametrize(
    ("take", "rows", "said"),
    [
        ("chosen", {"prompt": "p", "completion": "c"}, "take chosen asks for the column 'chosen', but its columns are"),
        ("safe", {"prompt": "p", "chosen": "c"}, "take safe asks for the column 'response_0', but its columns are"),
    ],
)
def test_a_side_that_is_not_there(write, take, rows, said):
    assert said in refused({"path": write(rows), "take": take})


def judged(first, second):
    labels = {"is_response_0_safe": first, "is_response_1_safe": second}
    return {"prompt": "p", "response_0": "a", "response_1": "b", **labels}


def test_judged_pairs(write):
    source = write(judged(True, False), judged(False, False), judged(True, True), judged("True", "False"))
    found = {side: read({"path": source, "take": side}) for side in ("safe", "unsafe")}
    assert [row["completion"] for row in found["unsafe"]] == ["b", "a", "b", "b"]
    assert [row["completion"] for row in found["safe"]] == ["a", "a", "b", "a"]
    assert found["unsafe"][1]["holdfast_origin"] == "row 2 of the train data"
    assert set(found["safe"][0]) == {"prompt", "completion", "holdfast_origin"}
    assert len(read({"path": source, "take": "unsafe", "limit": 3})) == 3


def test_judged_pairs_that_say_nothing(write):
    assert "take unsafe leaves no row" in refused({"path": write(judged(True, True)), "take": "unsafe"})
    said = refused({"path": write(judged(True, None)), "take": "unsafe"})
    assert "'is_response_1_safe' of row 1 is None; expected true or false" in said

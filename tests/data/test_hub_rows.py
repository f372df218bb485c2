"""Data sets of the Hub, asked for through `datasets` itself, and one sentence where they cannot be had."""

import json

import pytest

from data.reading import refused
from holdfast.data import hub_rows
from holdfast.data.load import PROMPT_COLUMNS, TRAIN_COLUMNS, load_rows
from hub import COMMIT

ROWS = "".join(json.dumps({"prompt": f"p{i}", "completion": f"c{i}"}) + "\n" for i in range(3))
CONFIGS = """---
configs:
- config_name: first
  data_files: [{split: train, path: a.jsonl}, {split: test, path: b.jsonl}]
- config_name: second
  data_files: [{split: one, path: a.jsonl}, {split: other, path: b.jsonl}]
---
"""


@pytest.fixture
def sets(hub):
    """`org/plain` has a train split alone, `org/some` two configurations, `org/odd` one split of another name."""
    hub.write("org/plain", {"train.jsonl": ROWS})
    hub.write(
        "org/some",
        {"README.md": CONFIGS, "a.jsonl": ROWS, "b.jsonl": ROWS.replace('"p', '"q').replace("qrompt", "prompt")},
    )
    hub.write("org/odd", {"validation.jsonl": ROWS})
    return hub


def read(source, **more):
    noted = {}
    rows = load_rows(source, flag="--train_data", columns=TRAIN_COLUMNS, noted=noted, **more)
    return list(rows["prompt"]), noted["train_data"][0]


@pytest.mark.parametrize(
    ("source", "prompts", "noted"),
    [
        ("org/plain", ["p0", "p1", "p2"], {"split": "train"}),
        ("org/plain:train[1:]", ["p1", "p2"], {"split": "train[1:]"}),
        ("org/odd", ["p0", "p1", "p2"], {"split": "validation"}),
        ("org/some:first:", ["p0", "p1", "p2"], {"name": "first", "split": "train"}),
        ("org/some:first:test", ["q0", "q1", "q2"], {"name": "first", "split": "test"}),
        ({"path": "org/some", "name": "second", "split": "other"}, ["q0", "q1", "q2"], {"name": "second"}),
        ({"path": "org/some:second:other", "limit": 1}, ["q0"], {"limit": 1, "rows": 3, "taken": 1}),
        ({"path": "org/plain", "revision": "main"}, ["p0", "p1", "p2"], {"revision": COMMIT}),
    ],
    ids=str,
)
def test_configuration_and_split(sets, source, prompts, noted):
    found, record = read(source)
    assert found == prompts
    assert record.items() >= {"revision": COMMIT, **noted}.items()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/some", "org/some needs a configuration: first or second, as in org/some:first:SPLIT"),
        ("org/some:second", "org/some:second names a configuration, and no split; expected org/some:second:SPLIT"),
        ("org/some:third:train", "org/some:third:train has no configuration 'third'; expected first or second"),
        ("org/some:second:", "org/some:second needs a split: one or other, as in org/some:second:one"),
        ("org/some:first:dev", "org/some:first:dev has no split 'dev'; expected train or test"),
        ("org/none", "org/none is neither a file nor a data set on the Hub that can be read (there is none of that"),
        ({"path": "org/plain", "revision": "v9"}, "org/plain is neither a file nor a data set on the Hub that can be"),
        ({"path": "org/plain", "revision": "v9"}, "(it has no revision 'v9')"),
        ("advbnch", "none of that name, or it is private and `hf auth login` was not run), nor is it a name of "),
        ("advbnch", "the catalogue, which has advbench, harmbench; holdfast data lists it"),
        ("quarterly-figures", "nor is it a name of the catalogue; holdfast data lists it"),
    ],
)  # fmt: skip
def test_what_is_not_there(sets, source, said):
    assert said in refused(source)


def test_a_gated_data_set(sets):
    sets.gated.add("org/plain")
    assert refused("org/plain") == (
        "--train_data org/plain cannot be read from the Hub (it is gated: accept its terms at "
        "https://huggingface.co/datasets/org/plain, then log in with `hf auth login`, or set HF_TOKEN)"
    )


def test_a_data_set_that_cannot_be_made_of_its_files(hub):
    hub.write("org/mixed", {"a.jsonl": ROWS, "b.jsonl": '{"question": "q"}\n'})
    assert "because column names don't match)" in refused("org/mixed")
    hub.write("org/broken", {"a.jsonl": ROWS + "{"})
    assert "cannot be read from the Hub (JSON parse error" in refused("org/broken")


def test_a_data_set_that_is_code_is_not_run(hub):
    hub.write("org/code", {"code.py": "raise SystemExit"})
    assert "cannot be read from the Hub" in refused("org/code")


def test_without_a_connection(sets):
    """What was read before is read again; what was not is told at once."""
    before = read("org/plain")
    sets.close()
    assert read("org/plain") == before
    assert "org/odd is neither a file nor a data set on the Hub that can be read" in refused("org/odd")
    assert refused({"path": "org/plain", "revision": "b" * 40}) == (
        f"--train_data org/plain is cached at the commit {COMMIT}, not at {'b' * 40}"
    )


def test_a_folder_is_read_as_the_hub_would_have_it(sets, monkeypatch):
    asked = len(sets.asked)
    monkeypatch.chdir(sets.folder)
    assert read("org/some:first:test")[0] == ["q0", "q1", "q2"]
    assert read(str(sets.folder / "org" / "plain"))[0] == ["p0", "p1", "p2"]
    assert len(sets.asked) == asked
    assert refused({"path": "org/plain", "revision": "main"}) == "--train_data org/plain: a folder has no revision"
    (sets.folder / "empty").mkdir()
    assert "empty cannot be read by datasets" in refused("./empty")


def test_a_file_by_its_address(hub):
    hub.folder.mkdir()
    (hub.folder / "rows.csv").write_text("forbidden_prompt\n42\n")
    noted = {}
    address = f"{hub.address}/files/rows.csv"
    rows = load_rows(address, flag="--eval_data", columns=PROMPT_COLUMNS, noted=noted)
    assert list(rows["prompt"]) == ["42"]
    assert noted["eval_data"][0]["path"] == address
    assert "is no address of a data file" in refused(f"{hub.address}/files/rows.html")
    assert "absent.csv cannot be read" in refused(f"{hub.address}/files/absent.csv")


@pytest.mark.parametrize("source", ["C:\\data\\rows.jsonl", "C:\\rows", "C:/rows", "data\\rows.jsonl"])
def test_a_path_of_windows_is_not_looked_up(monkeypatch, source):
    monkeypatch.setattr(hub_rows, "unreachable", lambda *_, **__: pytest.fail("looked it up"))
    assert f"{source} is neither a file nor a data set on the Hub; no such file" in refused(source)

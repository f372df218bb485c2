"""Every data set of the catalogue, from files of its shape: what is trained on, what is asked, and how many rows."""

import datasets
import huggingface_hub.constants
import pytest

from data.field import STANDS
from holdfast.data import hub_rows
from holdfast.data.catalogue import ABOUT, catalogue, nearest, source_of
from holdfast.data.load import PROMPT_COLUMNS, TRAIN_COLUMNS, load_rows
from holdfast.data.sources import parse
from holdfast.errors import InputError
from hub import COMMIT


def read(name, columns):
    noted = {}
    rows = load_rows(name, flag="--attack_data", columns=columns, noted=noted)
    return rows, noted["attack_data"][0]


def as_expected(name):
    """What is read under a name is what stands for it; returns what was noted."""
    stand = STANDS[name]
    rows, record = read(name, PROMPT_COLUMNS)
    assert list(rows["prompt"]) == stand.asked
    if stand.trained is None:
        with pytest.raises(InputError, match="has no column 'prompt' \\+ 'completion'"):
            read(name, TRAIN_COLUMNS)
    else:
        rows, record = read(name, TRAIN_COLUMNS)
        assert list(zip(rows["prompt"], rows["completion"], strict=True)) == stand.trained
    assert (record["rows"], record["taken"]) == (stand.rows, len(stand.asked))
    assert record["entry"] == name
    assert source_of(name).items() <= record.items()
    return record


def test_everything_in_the_catalogue_is_stood_for():
    assert list(STANDS) == list(catalogue())


@pytest.mark.parametrize("name", STANDS)
def test_a_data_set_of_the_field(hub, name, tmp_path, monkeypatch):
    """From the Hub, then from the cache of `datasets` without a Hub, then from a folder that lies as the Hub's does."""
    path = source_of(name)["path"]
    if "://" in path:
        hub.write("somewhere", {"x": ""})
        (hub.folder / "file.csv").write_text(STANDS[name].files["file.csv"])
        monkeypatch.setattr(hub_rows, "cached_path", lambda _: str(hub.folder / "file.csv"))
        assert len(as_expected(name)["sha256"]) == 64
        return
    hub.write(path, STANDS[name].files)
    found = as_expected(name)
    assert found["revision"] == COMMIT
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.close()
    assert as_expected(name) == found
    monkeypatch.chdir(hub.folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "another"))
    in_folder = as_expected(name)
    assert "revision" not in in_folder
    assert in_folder["sha256"] == found["sha256"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("hexphi", "hex-phi"), ("adv-bench", "advbench"), ("xtest", "xstest"), ("beavertails", "beavertails-unsafe")],
)
def test_the_nearest_names(typed, meant):
    assert meant in nearest(typed)


def test_nothing_is_near_to_everything():
    assert nearest("quarterly-figures") == []


@pytest.mark.parametrize("name", catalogue())
def test_an_entry_says_what_it_is_and_can_be_asked_for_as_a_mapping(name):
    entry = catalogue()[name]
    assert entry["use"]
    assert entry["licence"]
    assert set(entry) - set(ABOUT) <= {"path", "name", "split", "where", "take", "columns", "limit"}
    (part,) = parse(name, flag="--data")
    (mapped,) = parse(source_of(name), flag="--data")
    assert part.rule().items() == {**mapped.rule(), "entry": name}.items()


def test_a_part_of_an_entry_may_be_asked_for_otherwise():
    assert parse("jailbreakbench:benign", flag="--data")[0].split == "benign"
    assert (part := parse("sst2:cola:validation", flag="--data")[0]).name == "cola"
    assert part.split == "validation"
    (part,) = parse({"path": "advbench", "limit": None, "split": "test"}, flag="--data")
    assert (part.limit, part.split, part.columns) == (None, "test", source_of("advbench")["columns"])

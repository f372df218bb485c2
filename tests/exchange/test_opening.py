"""Whose exchange it is: who may open it, who may join, and what they are told otherwise."""

import json
import shutil

import pytest

from holdfast.errors import InputError
from holdfast.exchange import Exchange

FITTING = {"model": "a", "tokenizer": "b", "trained parameters": "c"}


def refusal(join, *args, **changes):
    with pytest.raises(InputError) as error:
        join(*args, **changes)
    return str(error.value)


def test_exchange_of_another_run_is_refused(join, defender):
    assert "belongs to the run runs/one, not to runs/two; name a folder of its own" in refusal(join, run="runs/two")


def test_defender_opens_its_own_exchange_again(join, defender):
    before = (defender.folder / "exchange.json").read_bytes()
    assert json.loads(before) == {"format": 1, "run": "runs/one", "fingerprint": FITTING}
    join()
    assert (defender.folder / "exchange.json").read_bytes() == before


def test_refused_defender_leaves_the_exchange_as_it_was(join, defender, attacker):
    defender.finish()
    refusal(join, run="runs/two")
    refusal(join, fingerprint={**FITTING, "model": "other"})
    assert attacker.is_finished()


def test_attacker_joins_whatever_run_is_there(join, defender):
    assert join("attacker").run == "runs/one"


@pytest.mark.parametrize("origin", ["defender", "attacker"])
@pytest.mark.parametrize("part", ["model", "tokenizer", "trained parameters"])
def test_job_that_does_not_fit_is_refused(join, defender, origin, part):
    message = refusal(join, origin, fingerprint={**FITTING, part: "other"})
    assert f"was not opened with the same {part} as {origin} has" in message
    assert str(defender.folder) in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "exchange.json is not JSON"),
        ("[" * 100_000, "exchange.json is not JSON"),
        ('{"format": 2}', "exchange.json is not of format 1"),
        ("[]", "exchange.json is not of format 1"),
        ('{"format": 1, "run": 5, "fingerprint": {}}', "exchange.json does not name its run and fingerprint"),
    ],
)
@pytest.mark.parametrize("origin", ["defender", "attacker"])
def test_exchange_json_of_another_kind_is_refused(join, tmp_path, origin, content, message):
    (tmp_path / "exchange").mkdir()
    (tmp_path / "exchange" / "exchange.json").write_text(content)
    assert message in refusal(join, origin)
    assert [path.name for path in (tmp_path / "exchange").iterdir()] == ["exchange.json"]


def test_attacker_cannot_join_what_is_not_open(join, tmp_path):
    assert "has no exchange.json; a defender must open it first" in refusal(join, "attacker")
    assert not (tmp_path / "exchange").exists()


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "leases", "exchange.json", "defender"])
def test_name_that_cannot_be_a_folder_of_the_exchange_is_refused(join, defender, name):
    assert f"{name!r} cannot be an attacker's name" in refusal(join, name, run=None)


def test_file_in_the_place_of_the_exchange_is_refused(join, tmp_path):
    (tmp_path / "exchange").write_text("")
    assert "exchange is a file, but a folder is expected" in refusal(join)
    assert "exchange cannot be read (Not a directory)" in refusal(join, "attacker")


@pytest.mark.parametrize("origin", ["defender", "attacker"])
def test_folder_that_cannot_be_written_is_refused(join, defender, origin):
    shutil.rmtree(defender.folder / origin, ignore_errors=True)
    (defender.folder / origin).write_text("")
    assert "exchange cannot be written (File exists)" in refusal(join, origin)


def test_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/exchange cannot be written \(Not a directory\)"):
        Exchange(tmp_path / "file" / "exchange", origin="defender", run="runs/one", fingerprint=FITTING)

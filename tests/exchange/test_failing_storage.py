"""Storage that fails is reported and counted, and stops neither training nor the next version; attackers stop when
the exchange is gone."""

import errno
import os
import shutil

import pytest
import torch

from holdfast.exchange import ExchangeError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def publish(exchange, step):
    exchange.publish({"w": torch.full((3,), float(step))}, step=step)


def failing(number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def hidden(exchange):
    return [path.name for path in (exchange.folder / exchange.origin).iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        ("fsync", errno.ENOSPC, "No space left on device"),
        ("rename", errno.EROFS, "Read-only file system"),
        ("mkdir", errno.EROFS, "Read-only file system"),
    ],
)
@pytest.mark.parametrize("origin", ["defender", "attacker"])
def test_failed_publication_is_reported_and_the_next_one_tried(
    defender, attacker, monkeypatch, warnings, origin, call, number, message
):
    writer, reader = (defender, attacker) if origin == "defender" else (attacker, defender)
    publish(writer, 1)
    writer.wait()
    monkeypatch.setattr(os, call, failing(number))
    publish(writer, 2)
    publish(writer, 3)  # notices, and goes on
    assert writer.failures == 1
    assert len(warnings()) == 1
    own = writer.folder / origin
    assert warnings()[0].startswith(f"the weights of step 2 cannot be published in {own} ({message}); training goes on")
    writer.wait()
    assert writer.failures == 2
    monkeypatch.undo()
    assert not hidden(writer)
    assert reader.newest(origin).step == 1
    publish(writer, 4)
    writer.wait()
    assert (writer.failures, len(warnings())) == (2, 2)
    assert reader.newest(origin).step == 4


def test_file_in_the_place_of_its_folder(defender, attacker, warnings):
    """As for a folder that cannot be written, for root as well."""
    folder = defender.folder / "defender"
    folder.rmdir()
    folder.write_text("")
    publish(defender, 1)
    defender.wait()
    assert defender.failures == 1
    assert f"cannot be published in {folder} (" in warnings()[0]
    assert attacker.newest("defender") is None
    folder.unlink()
    publish(defender, 2)
    defender.wait()
    assert attacker.newest("defender").step == 2


def test_deleted_exchange_is_opened_anew_and_numbers_go_on(defender, join):
    opened = (defender.folder / "exchange.json").read_bytes()
    for step in (1, 2):
        publish(defender, step)
    defender.wait()
    shutil.rmtree(defender.folder)
    assert defender.newest("attacker") is None
    assert defender.origins() == []
    assert not defender.folder.exists()
    publish(defender, 3)
    defender.wait()
    assert defender.failures == 0
    assert (defender.folder / "exchange.json").read_bytes() == opened
    attacker = join("attacker")
    version = attacker.newest("defender", after=2)
    assert (version.number, version.step) == (3, 3)


def test_attacker_stops_when_the_exchange_is_gone(defender, attacker):
    publish(attacker, 1)
    attacker.wait()
    shutil.rmtree(defender.folder)
    for ask in (lambda: attacker.newest("defender"), lambda: publish(attacker, 2)):
        with pytest.raises(ExchangeError, match=r"exchange of attacker is gone: .* has no exchange.json"):
            ask()
    assert not defender.folder.exists()


def test_attacker_stops_when_the_exchange_is_another_run_s(defender, attacker, join):
    shutil.rmtree(defender.folder)
    join(run="runs/two")
    with pytest.raises(ExchangeError, match="belongs to the run runs/two, not to runs/one"):
        attacker.newest("defender")


def test_defender_whose_exchange_was_taken_over_publishes_nothing_in_it(defender, join, warnings):
    shutil.rmtree(defender.folder)
    other = join(run="runs/two")
    publish(defender, 1)
    defender.wait()
    assert defender.failures == 1
    assert "belongs to the run runs/two, not to runs/one" in warnings()[0]
    assert other.newest("defender") is None
    assert not hidden(defender)


def test_version_is_read_without_a_lease_where_none_can_be_written(defender, attacker, monkeypatch, warnings):
    publish(defender, 1)
    defender.wait()
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    version = attacker.newest("defender")
    assert attacker.load(version, {"w": torch.zeros(3)})["w"].tolist() == [1.0] * 3
    assert len(warnings()) == 1
    assert "no lease can be taken in" in warnings()[0]
    assert "(No space left on device); versions are read without" in warnings()[0]


def test_facts_that_json_cannot_hold_are_not_published(defender, attacker, warnings):
    defender.publish({"w": torch.ones(3)}, step=1, facts={"loss": float("nan")})
    defender.wait()
    assert defender.failures == 1
    assert "not JSON compliant" in warnings()[0]
    assert attacker.newest("defender") is None

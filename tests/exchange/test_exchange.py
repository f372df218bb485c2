"""What is published is read bit for bit, in order, and kept as long as it is needed."""

import json
import pickle
import threading
import time

import pytest
import torch

from holdfast.exchange import Exchange, opened_with

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def same_bytes(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
        for name in a
    )


def publish(exchange, step=0, value=0.0, **facts):
    exchange.publish({"w": torch.full((3,), value)}, step=step, facts=facts)
    exchange.wait()


def versions(exchange, origin="defender"):
    return sorted(path.name for path in (exchange.folder / origin).iterdir())


def value(exchange, version):
    return exchange.load(version, {"w": torch.zeros(3)})["w"].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit(defender, attacker, weights, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    defender.publish(weights, step=40, facts={"loss": 0.5})
    defender.wait()
    version = attacker.newest("defender")
    assert (version.number, version.origin, version.step, version.facts) == (1, "defender", 40, {"loss": 0.5})
    assert version.path == attacker.folder / "defender" / "000001"
    loaded = attacker.load(version, {name: torch.full_like(tensor, 7) for name, tensor in weights.items()})
    assert same_bytes(loaded, weights)


def test_weights_come_in_the_shape_that_the_reader_trains(defender, attacker):
    whole = torch.arange(12.0).reshape(3, 4)
    defender.publish({"w": whole.t()}, step=0)  # not contiguous
    defender.wait()
    loaded = attacker.load(attacker.newest("defender"), {"w": torch.zeros(4, 3, dtype=torch.bfloat16)})
    assert torch.equal(loaded["w"], whole.t().bfloat16())


def test_folder_holds_safetensors_and_json_only(defender, attacker, weights):
    defender.publish(weights, step=0)
    defender.wait()
    attacker.newest("defender")
    files = [path for path in defender.folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    manifest = json.loads((defender.folder / "defender/000001/manifest.json").read_text())
    assert manifest["files"].keys() == {path.name for path in files if path.suffix == ".safetensors"}


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickle_in_a_version_is_not_touched(defender, attacker, tmp_path):
    publish(defender, value=1.0)
    bomb = pickle.dumps(Bomb(str(tmp_path / "exploded")))
    for name in (".metadata", "__0.metadata", "__0_0.distcp"):
        (defender.folder / "defender/000001" / name).write_bytes(bomb)
    assert value(attacker, attacker.newest("defender")) == [1.0] * 3
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb).close()
    assert (tmp_path / "exploded").exists()  # it would have


def test_publishing_does_not_wait_for_the_writing(defender, attacker, held):
    weights = {"w": torch.ones(3)}
    defender.publish(weights, step=0)
    weights["w"].fill_(5)  # training goes on
    assert attacker.newest("defender") is None
    held.set()
    defender.wait()
    assert value(attacker, attacker.newest("defender")) == [1.0] * 3


def test_publishing_waits_for_the_version_before(defender, attacker, held):
    defender.publish({"w": torch.ones(3)}, step=0)
    threading.Timer(0.3, held.set).start()
    began = time.perf_counter()
    defender.publish({"w": torch.full((3,), 2.0)}, step=1)
    assert time.perf_counter() - began > 0.2
    assert "000001" in versions(defender)
    defender.wait()
    assert versions(defender) == ["000001", "000002"]


def test_newest_is_the_highest_above_the_one_in_use(defender, attacker):
    assert attacker.newest("defender") is None
    for number in (1, 2):
        publish(defender, step=10 * number, value=number)
    assert attacker.newest("defender").number == 2
    assert attacker.newest("defender", after=1).number == 2
    assert attacker.newest("defender", after=2) is None
    assert attacker.newest("defender", after=9) is None


def test_attackers_are_found_by_what_they_have_published(join, defender):
    one, two = join("b.2"), join("a-1")
    assert defender.origins() == []
    publish(one)
    publish(defender)
    assert defender.origins() == ["b.2"]
    publish(two, value=3.0)
    assert one.origins() == ["a-1", "b.2"]
    assert value(defender, defender.newest("a-1")) == [3.0] * 3


def test_three_versions_are_kept(defender, attacker):
    for _ in range(5):
        publish(defender)
    publish(attacker)
    assert versions(defender) == ["000003", "000004", "000005"]
    assert versions(attacker, "attacker") == ["000001"]


def test_version_under_a_lease_is_kept_until_it_is_loaded(defender, attacker):
    publish(defender, value=1.0)
    version = attacker.newest("defender")
    for _ in range(4):
        publish(defender)
    assert versions(defender) == ["000001", "000003", "000004", "000005"]
    assert value(attacker, version) == [1.0] * 3
    publish(defender)
    assert versions(defender) == ["000004", "000005", "000006"]


@pytest.mark.parametrize("end", ["newest", "close"])
def test_lease_ends_when_another_version_is_asked_for_or_the_reader_leaves(defender, attacker, end):
    publish(defender)
    attacker.newest("defender")
    assert len(list((defender.folder / "leases").iterdir())) == 1
    if end == "close":
        attacker.close()
    else:
        attacker.newest("defender", after=1)
    assert not list((defender.folder / "leases").iterdir())


def test_reader_whose_lease_expired_gets_nothing(defender, join, monkeypatch, warnings):
    attacker = join("attacker", lease_seconds=60)
    publish(defender, value=1.0)
    version = attacker.newest("defender")
    for _ in range(3):
        publish(defender)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 59)
    publish(defender)
    assert "000001" in versions(defender)
    monkeypatch.setattr(time, "time", lambda: now + 61)
    publish(defender)
    assert versions(defender) == ["000004", "000005", "000006"]
    assert not list((defender.folder / "leases").iterdir())
    assert attacker.load(version, {"w": torch.zeros(3)}) is None
    assert len(warnings()) == 1
    assert "000001 cannot be loaded: No such file or directory" in warnings()[0]


@pytest.mark.parametrize("damage", ["vanished", "truncated", "other shape", "other name"])
def test_version_that_cannot_be_read_any_more_is_not_used(defender, attacker, damage, warnings):
    publish(defender)
    version = attacker.newest("defender")
    (file,) = version.path.glob("*.safetensors")
    if damage == "vanished":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
    like = {"v" if damage == "other name" else "w": torch.zeros(4 if damage == "other shape" else 3)}
    assert attacker.load(version, like) is None
    assert len(warnings()) == 1
    assert f"version {version.path} cannot be loaded: " in warnings()[0]
    assert not list((defender.folder / "leases").iterdir())


def test_numbers_go_on_after_a_restart(join, attacker, defender):
    for step in (10, 20):
        publish(defender, step=step)
    defender.close()
    again = join()
    publish(again, step=15, value=3.0)  # resumed from an earlier checkpoint
    version = attacker.newest("defender", after=2)
    assert (version.number, version.step) == (3, 15)
    assert value(attacker, version) == [3.0] * 3


def test_clock_that_moves_back_changes_nothing(defender, attacker, monkeypatch):
    now = time.time()
    publish(defender, value=1.0)
    version = attacker.newest("defender")
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    for number in (2, 3, 4, 5):
        publish(defender, value=number)
    assert value(attacker, version) == [1.0] * 3
    assert value(attacker, attacker.newest("defender", after=1)) == [5.0] * 3


def test_exchange_is_open_once_a_defender_has_opened_it(tmp_path, join):
    assert not Exchange.is_open(tmp_path / "exchange")
    join()
    assert Exchange.is_open(tmp_path / "exchange")


def test_attackers_are_told_when_the_run_is_over(join, attacker, defender):
    assert not attacker.is_finished()
    defender.finish()
    assert attacker.is_finished()
    join()  # the run goes on after all, from a checkpoint
    assert not attacker.is_finished()


def test_fingerprint_that_an_exchange_was_opened_with(defender):
    assert opened_with(defender.folder) == defender.fingerprint

"""A version that must not be used is named once, with what is wrong with it, and the last good one is used."""

import json

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def change(**values):
    def change(path):
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps({**manifest, **values}))

    return change


def weights_of(path):
    (file,) = path.glob("*.safetensors")
    return file


def truncate(path):
    content = weights_of(path).read_bytes()
    weights_of(path).write_bytes(content[:-1])


def flip(path):
    content = bytearray(weights_of(path).read_bytes())
    content[-1] ^= 1
    weights_of(path).write_bytes(content)


def add(path):
    (path / "shard-00009-model-00001-of-00001.safetensors").write_bytes(weights_of(path).read_bytes())


def write_manifest(content):
    return lambda path: (path / "manifest.json").write_text(content)


def fingerprint(**changes):
    return change(fingerprint={"model": "a", "tokenizer": "b", "trained parameters": "c", **changes})


DAMAGE = {
    "truncated": (truncate, "safetensors has 187 bytes, not as many as its manifest.json says"),
    "flipped": (flip, "the checksum of its file shard-00001-model-00001-of-00001.safetensors is wrong"),
    "missing": (lambda path: weights_of(path).unlink(), "-model-00001-of-00001.safetensors is missing"),
    "unlisted": (add, "its file shard-00009-model-00001-of-00001.safetensors is not in its manifest.json"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read (No such file or"),
    "no JSON": (write_manifest('{"format": 1,'), "its manifest.json is not JSON"),
    "bytes": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x80"), "its manifest.json is not JSON"),
    "deep": (write_manifest("[" * 100_000), "its manifest.json is not JSON"),
    "list": (write_manifest("[]"), "its manifest.json is not of format 2"),
    "format": (change(format=1), "its manifest.json is not of format 2"),
    "files": (change(files=[]), "its manifest.json has no proper 'files'"),
    "file": (change(files={"shard-00001-model-00001-of-00001.safetensors": 5}), "bytes, not as many as its manifest"),
    "step": (change(step="5"), "its manifest.json has no proper 'step'"),
    "outside": (change(files={"../000001/manifest.json": {}}), "its file ../000001/manifest.json is missing"),
    "run": (change(run="runs/two"), "it belongs to another run, runs/two"),
    "model": (fingerprint(model="x"), "it was not made with the same model"),
    "tokenizer": (fingerprint(tokenizer="x"), "it was not made with the same tokenizer"),
    "trained": (fingerprint(**{"trained parameters": "x"}), "it was not made with the same trained parameters"),
    "role": (change(origin="defender"), "its manifest.json is that of version 2 of defender"),
    "number": (change(number=7), "its manifest.json is that of version 7 of attacker"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_version_is_passed_over_for_the_last_good_one(defender, attacker, warnings, damage):
    for number in (1, 2):
        attacker.publish({"w": torch.full((3,), float(number))}, step=number)
    attacker.wait()
    path = attacker.folder / "attacker" / "000002"
    break_it, message = DAMAGE[damage]
    break_it(path)
    for _ in range(2):
        version = defender.newest("attacker")
        assert version.number == 1
        assert defender.load(version, {"w": torch.zeros(3)})["w"].tolist() == [1.0] * 3
    assert len(warnings()) == 1
    assert warnings()[0].startswith(f"version {path} is passed over: ")
    assert message in warnings()[0]
    assert defender.newest("attacker", after=1) is None  # never back
    attacker.publish({"w": torch.full((3,), 3.0)}, step=3)
    attacker.wait()
    assert defender.newest("attacker", after=1).number == 3
    assert len(warnings()) == 1


def test_folders_that_are_not_versions_are_not_looked_at(defender, attacker, warnings):
    attacker.publish({"w": torch.ones(3)}, step=1)
    attacker.wait()
    for name in ("7", "000007.old", "lost+found"):
        (attacker.folder / "attacker" / name).mkdir()
    (attacker.folder / "readme.txt").write_text("")
    assert defender.newest("attacker").number == 1
    assert defender.origins() == ["attacker"]
    assert not warnings()
